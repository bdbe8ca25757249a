"""Bugs in what deals out between layers, and in the methods that do."""

from __future__ import annotations

from bug import Mutation

BUGS = [
    Mutation("the threshold of the code everywhere", "methods/sora.py", "soft(p.gate, lr * float(p.lam))", "soft(p.gate, float(p.lam))", "goldens/test_sora"),
    Mutation("gates at 0 stay in the edit", "forms/gated.py", "left = p.gate.detach() != 0", "left = p.gate.detach() != 9", "goldens/test_sora"),
    Mutation("the gate is not in the edit", "forms/gated.py", "(p.B * p.gate).detach()[:, left]", "p.B.detach()[:, left]", "goldens/test_sora"),
    Mutation("a soft threshold that is hard", "forms/threshold.py", "x.sign() * (x.abs() - t).clamp_min(0)", "x * (x.abs() > t)", "goldens/test_sora"),
    Mutation("stages in equal steps, whatever the schedule", "forms/threshold.py", "math.exp(math.log(first) + t * (math.log(last) - math.log(first)))", "first + t * (last - first)", "goldens/test_sora"),
    Mutation("DoRA forgets the hook of what is inside", "forms/rescale.py", "        self.inside().after_step(p, lr)\n", "        pass\n", "goldens/test_sora"),
    Mutation("one scale for all ranks", "methods/dylora.py", "self.scale_at(p.drawn.double()) / self.scale", "1.0", "goldens/test_dylora"),
    Mutation("frozen ranks have a gradient", "methods/dylora.py", "A, B = torch.where(new[:, None], A, A.detach()), torch.where(new, B, B.detach())", "pass", "goldens/test_dylora"),
    Mutation("what is frozen moves with the optimizer", "forms/paced.py", "P.copy_(torch.lerp(before, P, pace.to(P.dtype).expand_as(P)))", "pass", "goldens/test_dylora"),
    Mutation("always the same rank", "forms/nested.py", "        p.step.add_(1)\n", "        pass\n", "goldens/test_dylora"),
    Mutation("a rank too many", "forms/nested.py", "torch.arange(self.rank, device=p.drawn.device) < p.drawn", "torch.arange(self.rank, device=p.drawn.device) <= p.drawn", "goldens/test_dylora"),
    Mutation("a prefix with the scale of the whole", "methods/dylora.py", "edit.A[:rank].contiguous(), self.scale_at(rank)", "edit.A[:rank].contiguous(), self.scale", "goldens/test_dylora"),
    Mutation("a new rank comes at once", "forms/growing.py", "((p.step - p.began + 1) / (self.warm + 1)).clamp(max=1)", "torch.ones_like(p.lam)", "goldens/test_increlora"),
    Mutation("the reserve outlives the growth", "forms/growing.py", "            for p in states.values():\n                self.lay_in(p, 0)\n", "            pass\n", "goldens/test_increlora"),
    Mutation("the last round goes over the target", "forms/growing.py", "len(p.lam) - counts[site], goal - sum(counts.values()))", "len(p.lam) - counts[site])", "goldens/test_increlora"),
    Mutation("rank goes where it matters least", "forms/growing.py", "key=lambda site: -self.score(states[site])", "key=lambda site: self.score(states[site])", "goldens/test_increlora"),
    Mutation("the score without the change", "forms/importance.py", "small * (size * G).abs().sum()", "small * G.abs().sum()", "goldens/test_increlora"),
    Mutation("what is not in use acts", "forms/growing.py", "torch.where(acts, p.lam, 0)", "p.lam", "goldens/test_increlora"),
    Mutation("rewards without their mean", "allocators/ist.py", "(rewards - rewards.mean()).tolist()", "rewards.tolist()", "goldens/test_ist"),
    Mutation("p of the scores as they change", "allocators/ist.py", "self.mu * advantage * (p * (1 - p))[at]", "self.mu * advantage * (torch.sigmoid(state[\"scores\"]) * (1 - torch.sigmoid(state[\"scores\"])))[at]", "goldens/test_ist"),
    Mutation("layers that do not matter train most", "allocators/ist.py", "torch.sigmoid(-state[\"scores\"])", "torch.sigmoid(state[\"scores\"])", "goldens/test_ist"),
    Mutation("a damped layer is damped twice", "allocators/turns.py", "return base + factor * (y - base)", "return base + factor**2 * (y - base)", "goldens/test_ist"),
    Mutation("a gradient of an earlier turn is left", "allocators/turns.py", "                parameter.grad = None", "                pass", "goldens/test_ist"),
    Mutation("scores are measured in training mode", "allocators/turns.py", "    model.eval()\n", "", "goldens/test_ist"),
]  # fmt: skip
