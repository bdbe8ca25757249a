"""Planted bugs in the blocks of MELoRA and in what NOLA and RandLoRA make of a seed."""

from bug import Mutation

BUGS = [
    Mutation("a shift of the hash brings in the sign", "support/noise.py", "x ^= (x >> 16) & 0xFFFF", "x ^= x >> 16", "goldens/test_noise"),
    Mutation("streams of one key are the same", "support/noise.py", "^ (key >> 32)) ^ stream)", "^ (key >> 32)) ^ 0)", "goldens/test_noise"),
    Mutation("the upper half of a key is left out", "support/noise.py", "_mix((key & _LOW32) ^ _GOLDEN) ^ (key >> 32)", "_mix((key & _LOW32) ^ _GOLDEN) ^ (key >> 63)", "goldens/test_noise"),
    Mutation("a combination is divided by k", "support/noise.py", "return total / math.sqrt(len(coefficients))", "return total / len(coefficients)", "goldens/test_nola"),
    Mutation("a combination's gradient keeps its scale back", "support/noise.py", "return torch.cat(parts) / math.sqrt(ctx.count)", "return torch.cat(parts)", "goldens/test_nola"),
    Mutation("a combination forgets its last block", "support/noise.py", "for start in range(0, count, step)]", "for start in range(0, max(step, count - step), step)]", "goldens/test_noise"),
    Mutation("NOLA's B begins with a matrix as A does", "edits/seeded.py", "B = combination(c.to(wide), key, UP, O * rank).view(O, rank)", "B = (combination(c.to(wide), key, UP, O * rank) + noise(key, UP, (0, 1), (0, O * rank), wide)[0]).view(O, rank)", "goldens/test_nola"),
    Mutation("NOLA mixes both factors of the same matrices", "edits/seeded.py", "START, DOWN, UP = 0, 1, 2", "START, DOWN, UP = 0, 1, 1", "goldens/test_nola"),
    Mutation("NOLA draws its seed anew when it is restored", "methods/nola.py", "return self._state(site, self.own(like, site), edit.seed)", "return self._state(site, self.own(like, site), edit.seed + 1)", "goldens/test_nola"),
    Mutation("RandLoRA's gradient of lambda without gamma", "edits/seeded.py", 'torch.einsum("kjt,kt,jt->kj", g, A, gamma)', 'torch.einsum("kjt,kt->kj", g, A)', "goldens/test_randlora"),
    Mutation("RandLoRA pairs as PEFT does, always", "edits/seeded.py", 'rows.transpose(0, 1) if order == "paper" else rows', "rows", "goldens/test_randlora"),
    Mutation("RandLoRA is not turned round for a wide weight", "edits/seeded.py", "(large, small) if shape[0] >= shape[1] else (small.mT, large.mT)", "(large, small) if shape[0] > shape[1] else (small.mT, large.mT)", "goldens/test_randlora"),
    Mutation("sparse bases are not brought to variance 1", "edits/seeded.py", "math.sqrt(s) * N.sign()", "N.sign()", "goldens/test_randlora"),
    Mutation("twice as many entries of a sparse basis", "edits/seeded.py", "(N.abs() < 1 / s)", "(N.abs() < 2 / s)", "goldens/test_randlora"),
    Mutation("RandLoRA's branch keeps its bases", "forms/delta.py", "if not torch.is_grad_enabled():", "if True:", "goldens/test_randlora"),
    Mutation("MELoRA's slices are interleaved", "methods/melora.py", "x.reshape(-1, self.blocks, p.A.shape[2]).transpose(0, 1)", "x.reshape(-1, p.A.shape[2], self.blocks).permute(2, 0, 1)", "goldens/test_melora"),
    Mutation("MELoRA starts by the whole width", "methods/melora.py", "bound = 1 / math.sqrt(I / n)", "bound = 1 / math.sqrt(I)", "goldens/test_melora"),
    Mutation("MELoRA's blocks may leave a rest", "methods/melora.py", "if O % self.blocks or I % self.blocks:", "if I % self.blocks:", "goldens/test_melora"),
    Mutation("blocks without their scale", "edits/blocks.py", "diagonal(self.scale * (self.B.to", "diagonal((self.B.to", "goldens/test_melora"),
    Mutation("an edit without coefficients changes nothing only if it has no A", "compress/numbers.py", "return bool(edit.c.any())", "return bool(edit.a.any())", "compress/test_forms"),
]  # fmt: skip
