"""Planted bugs in the optimizers."""

from bug import Mutation

BUGS = [
    Mutation(
        "eps corrected as torch does", "optim/adam.py",
        "V.sqrt().add_(group[\"eps\"])", "V.sqrt().add_(group[\"eps\"] * (1 - b2**t) ** 0.5)", "goldens/test_projected",
    ),
    Mutation(
        "a tall gradient is projected on the left", "optim/projection.py",
        "wide = shape[0] < shape[1]", "wide = True", "goldens/test_projected",
    ),
    Mutation(
        "a subspace is drawn one step late", "optim/galore.py",
        "if turn % group[\"gap\"] == 0:", "if turn % group[\"gap\"] == 1 or not turn:", "goldens/test_projected",
    ),
    Mutation(
        "alpha in front of nothing", "optim/galore.py",
        "float(group[\"lr\"] * group[\"scale\"])", "float(group[\"lr\"])", "goldens/test_projected",
    ),
    Mutation(
        "the limiter compares with the norm before it was limited", "optim/fira.py",
        "            S = S / over\n            norm = torch.linalg.vector_norm(S)\n", "            S = S / over\n", "goldens/test_projected",
    ),
    Mutation(
        "phi of the other dimension", "optim/fira.py",
        "else 0 if \"P\" in state else 1", "else 1 if \"P\" in state else 0", "goldens/test_projected",
    ),
    Mutation(
        "the rest of Fira without the bias correction", "optim/fira.py",
        "p.add_(S, alpha=-lr * factor)", "p.add_(S, alpha=-lr)", "goldens/test_projected",
    ),
    Mutation(
        "FRUGAL does not begin anew", "optim/frugal.py",
        "        if group[\"reset\"]:\n            self.forget(p)", "        if group[\"reset\"]:\n            pass", "goldens/test_projected",
    ),
    Mutation(
        "signs on the active columns as well", "optim/frugal.py",
        "rest = G if q is None else projection.rest(G, state)", "rest = G", "goldens/test_projected",
    ),
    Mutation(
        "kappa where it is not", "optim/frugal.py",
        "alpha=-lr * group[\"kappa\"]", "alpha=-lr", "goldens/test_projected",
    ),
    Mutation(
        "what is projected forgets its schedule", "optim/wrapped.py",
        "projected.update(options | {\"lr\": 1.0}", "projected.update(options", "optim/test_laws",
    ),
    Mutation(
        "a loaded state is cast to the weight's type", "optim/wrapped.py",
        "k: v.to(v.device if v.ndim == 0 else p.device, copy=True) if", "k: v.to(v.device if v.ndim == 0 else p.device, p.dtype, copy=True) if",
        "optim/test_laws",
    ),
    Mutation(
        "the inner optimizer does not get its state back", "optim/wrapped.py",
        "self._give(p, {k: v for k, v in self.state[p].items() if k not in self.own})", "self._give(p, {})", "optim/test_laws",
    ),
    Mutation(
        "B learns as A does", "optim/lora_plus.py",
        "\"up\": self.ratio * lr", "\"up\": lr", "goldens/test_lora_plus",
    ),
    Mutation(
        "the moments stay in the old basis", "optim/rite.py",
        "b1 * (state[\"moment\"] @ P.mT)", "b1 * state[\"moment\"]", "goldens/test_lora_rite",
    ),
    Mutation(
        "the second moment is a sum, not a mean", "optim/rite.py",
        "(u.mT @ u / len(u))", "(u.mT @ u)", "goldens/test_lora_rite",
    ),
    Mutation(
        "A moves with its own inverse", "optim/rite.py",
        "self.inverses = (torch.linalg.pinv(R_A), torch.linalg.pinv(R_B))", "self.inverses = (torch.linalg.pinv(R_B), torch.linalg.pinv(R_A))",
        "goldens/test_lora_rite",
    ),
    Mutation(
        "full fine-tuning of every second row", "methods/full.py",
        "return shape[0]", "return shape[0] // 2", "goldens/test_full",
    ),
]  # fmt: skip
