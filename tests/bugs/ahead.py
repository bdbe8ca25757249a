"""Planted bugs in what stands before the tokens: prompts, prefixes, and the decoder that is given them."""

from bug import Mutation

A = "edits/ahead.py"

BUGS = [
    Mutation(
        "decoder: the states of a prompt are not cut off", A, "y = _cut(module, y, 0 if seen else prompts, keep or not keys)",
        "y = _cut(module, y, 0, keep or not keys)", "test_decoders",
    ),
    Mutation(
        "decoder: a prompt is put in again at every token", A, "    if prompts and not seen:\n        before = _of_rows(parts, B, lambda part: part.embeddings",
        "    if prompts:\n        before = _of_rows(parts, B, lambda part: part.embeddings", "test_decoders",
    ),
    Mutation(
        "decoder: padding counts in the positions", A, "padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)",
        "padding = 0 * (mask.cumsum(1) == 0).sum(1, keepdim=True)", "goldens/test_ahead",
    ),
    Mutation(
        "decoder: tokens do not count on from what stands before", A, "        found = positions + own\n", "        found = positions\n",
        "goldens/test_ahead",
    ),
    Mutation(
        "decoder: keys and values change places", A, "            for which in (0, 1)\n", "            for which in (1, 0)\n", "goldens/test_ahead",
    ),
    Mutation(
        "decoder: what fills up a row is looked at", A,
        "pieces = (zeros(keys - self.keys), ones(self.keys), zeros(prompts - self.prompts), ones(self.prompts))",
        "pieces = (ones(keys), ones(prompts))", "test_decoders",
    ),
    Mutation(
        "decoder: the highest stands first", A, "return Call((one, *self.ahead))", "return Call((*self.ahead, one))", "test_decoders",
    ),
    Mutation(
        "decoder: a cache of the base is gone on with", A, "mask.shape[1] != seen - n + T", "mask.shape[1] > seen + T", "test_decoders",
    ),
    Mutation(
        "decoder: a prefix is dropped under gradient checkpointing", A, 'getattr(part, "gradient_checkpointing", False)',
        "False", "test_decoders",
    ),
    Mutation(
        "decoder: a prompt at half strength is taken", A, "if factor != 1:", "if factor == 0:", "test_decoders",
    ),
    Mutation(
        "decoder: no cache is kept back that was not asked for", A, 'if name == "past_key_values" and not keep:',
        'if name == "past_key_values" and False:', "test_decoders",
    ),
    Mutation(
        "decoder: a class of another name, whose states nobody records", "chain.py", '"__qualname__": cls.__qualname__', '"made": True',
        "test_decoders",
    ),
    Mutation(
        "prefix: the MLP's keys and values are laid out layer by layer", "methods/prefix.py", "made.view(n, L, 2, h, d).permute(2, 1, 3, 0, 4)",
        "made.view(n, 2, L, h, d).permute(1, 2, 3, 0, 4)", "goldens/test_ahead",
    ),
    Mutation(
        "prefix: a loaded one is thrown away for a fresh MLP", "methods/prefix.py", 'for k in ("W2", "b2")}', 'for k in ("W1", "b2")}',
        "goldens/test_ahead",
    ),
    Mutation(
        "prompt: ids are not repeated", "methods/prompt.py", ".repeat(-(-self.tokens // len(self.ids)))", ".repeat_interleave(self.tokens)",
        "goldens/test_ahead",
    ),
    Mutation(
        "prompt: the rows of a scaled embedding as they are stored", "methods/prompt.py", "site.operator.embed_scale * W[", "W[",
        "goldens/test_ahead",
    ),
]  # fmt: skip
