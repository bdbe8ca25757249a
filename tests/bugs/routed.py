"""Planted bugs in routed mixtures and in what is activated by tokens."""

from bug import Mutation

BUGS = [
    Mutation("the balance moves the wrong way", "forms/mixture.py", "self.speed * wanting.sign()", "-self.speed * wanting.sign()", "goldens/test_smora"),
    Mutation("padding is counted", "forms/mixture.py", "counted = (gy != 0).any(", "counted = (gy == gy).any(", "goldens/test_smora"),
    Mutation(
        "the balance bends the gates", "edits/routed.py",
        "return GATES[self.gate](z.gather(-1, which)), which", "return GATES[self.gate]((z + self.b.to(z)).gather(-1, which)), which", "goldens/test_smora",
    ),
    Mutation("the balance is not asked for the choice", "edits/routed.py", "(z.detach() + self.b.to(v.device))", "z.detach()", "goldens/test_smora"),
    Mutation("gates sum to one", "edits/routed.py", "z.shape[-1] * z.softmax(-1)", "z.softmax(-1)", "goldens/test_smora"),
    Mutation("softmax over all", "edits/routed.py", "(z.gather(-1, which)), which", "(z).gather(-1, which), which", "goldens/test_smora"),
    Mutation("blocks of ranks run across", "edits/routed.py",
             "gate.repeat_interleave(len(self.A) // N, -1)", "gate.repeat(*[1] * (gate.ndim - 1), len(self.A) // N)", "goldens/test_smora"),
    Mutation("the balance is rounded with the rest", "edits/routed.py", 'wide = frozenset({"b"})', "wide = frozenset()", "goldens/test_smora"),
    Mutation("the first invocation counts", "edits/activated.py",
             "torch.where(hits, torch.arange(hits.shape[1], device=tokens.device), -1).amax(1)",
             "torch.where(hits.any(1), hits.long().argmax(1), -1)", "goldens/test_alora"),
    Mutation("active after the invocation", "edits/activated.py",
             "start = self._starts[invocation] + start_offset", "start = self._starts[invocation] + len(invocation) + start_offset",
             "goldens/test_alora"),
    Mutation("a cache is forgotten", "edits/activated.py", "setattr(cache, TOKENS, self.tokens)", "pass", "goldens/test_alora"),
    Mutation("the past is forgotten", "edits/activated.py", "self.past = _length(cache)", "self.past = 0", "goldens/test_alora"),
    Mutation("rows are mixed up", "chain.py", "p.seen = p.seen.of_rows(self.rows)", "p.seen = p.seen.of_rows(self.rows.flip(0))",
             "goldens/test_alora"),
    Mutation("not found is everywhere", "edits/activated.py", "return torch.where(last < 0, nowhere, last)", "return last", "goldens/test_alora"),
    Mutation("a deck does not look at tokens", "deck/inserts.py", "inserted=one.inserted.watching(seen)", "inserted=one.inserted",
             "goldens/test_alora"),
    Mutation("the hook stays", "deck/inserts.py", "        seen.leave(model)", "        pass", "goldens/test_alora"),
]  # fmt: skip
