"""The GPT: its definition, its blindness to padding and to the future, its cache, and the scalar on top."""

import math
import tempfile
from pathlib import Path

import pytest
import torch

from planting import close, edited, f64, normal, raises, replaced
from rlhfkit import gpt
from rlhfkit.checkpoints import load_checkpoint, save_checkpoint
from rlhfkit.gpt import GPT, Block, GPTConfig, ScalarModel

pytestmark = pytest.mark.usefixtures("device")
SIZES = {"vocab_size": 11, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2, "pad_id": 0}


def make(GPT=GPT, **changes):
    """Every parameter is drawn anew, and large, in double precision: no two inputs give the same output."""
    model = GPT(GPTConfig(**SIZES | changes)).double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.7 * normal(*parameter.shape, seed=i))
    return model.eval()


def with_block(Block, **changes):
    with replaced(gpt, Block=Block):
        return make(**changes)


def row(*tokens):
    return torch.tensor([tokens])


def layer_norm(x, norm):
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - mean) / deviation * w + b for v, w, b in zip(x, norm.weight.tolist(), norm.bias.tolist(), strict=True)]


def affine(x, layer):
    return [
        sum(a * w for a, w in zip(x, row, strict=True)) + b
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def add(x, y):
    return [a + b for a, b in zip(x, y, strict=True)]


def attend(queries, keys, values):
    """Of the last query over all keys, one head."""
    size = len(keys[0])
    weights = [math.exp(sum(a * b for a, b in zip(queries[-1], k, strict=True)) / math.sqrt(size)) for k in keys]
    return [sum(w * v[i] for w, v in zip(weights, values, strict=True)) / sum(weights) for i in range(size)]


def by_hand(model, tokens):
    """Hidden states of one sequence, number by number, from the definition."""
    token, position = model.token_embedding.weight.tolist(), model.position_embedding.weight.tolist()
    stream = [add(token[t], position[i]) for i, t in enumerate(tokens)]
    for block in model.blocks:
        width, size = len(stream[0]), len(stream[0]) // block.n_head
        qkv = [affine(layer_norm(x, block.norm_1), block.qkv) for x in stream]
        new = []
        for i, x in enumerate(stream):
            heads = []
            for h in range(0, width, size):
                q, k, v = ([y[part + h : part + h + size] for y in qkv[: i + 1]] for part in (0, width, 2 * width))
                heads += attend(q, k, v)
            x = add(x, affine(heads, block.attention_out))
            up = affine(layer_norm(x, block.norm_2), block.up)
            up = [u / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) for u in up]
            new.append(add(x, affine(up, block.down)))
        stream = new
    return [layer_norm(x, model.norm) for x in stream]


def test_hidden_states_and_logits_are_those_of_the_definition(GPT=GPT, Block=Block):
    with replaced(gpt, Block=Block):
        model = make(GPT)
    tokens = [3, 7, 3, 10, 1]
    hidden = by_hand(model, tokens)
    close(model.hidden(row(*tokens))[0], f64(hidden))
    embedding = model.token_embedding.weight.tolist()
    logits = [[sum(a * b for a, b in zip(h, e, strict=True)) for e in embedding] for h in hidden]
    close(model.logits(row(*tokens))[0], f64(logits))
    close(model(row(*tokens)), model.unembed(model.hidden(row(*tokens))))


def test_what_comes_later_changes_nothing_before(Block=Block):
    model = with_block(Block)
    tokens = row(3, 7, 5, 2, 9, 4)
    whole = model.logits(tokens)
    for length in range(1, 6):
        close(model.logits(tokens[:, :length]), whole[:, :length])


PADDED = [  # one sequence, with padding before, after, between
    [3, 7, 5, 9, 0, 0, 0, 0],
    [0, 0, 0, 0, 3, 7, 5, 9],
    [0, 3, 0, 0, 7, 5, 0, 9],
    [3, 0, 7, 5, 9, 0, 0, 0],
]


def test_padding_before_after_or_between_is_not_there(GPT=GPT, Block=Block):
    """Logits and gradient are those of the sequence without it, alone or in a batch, and finite at the padding too."""
    with replaced(gpt, Block=Block):
        model = make(GPT)
    alone = model.logits(row(3, 7, 5, 9))
    expected = torch.autograd.grad(alone.square().sum(), list(model.parameters()))
    for tokens in (torch.tensor(PADDED), *(row(*padded) for padded in PADDED)):
        real = tokens != 0
        logits = model.logits(tokens)
        assert logits.isfinite().all()
        close(logits[real].view(len(tokens), 4, 11), alone.expand(len(tokens), -1, -1))
        loss = torch.where(real.unsqueeze(-1), logits, 0.0).square().sum() / len(tokens)
        for got, slope in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
            assert got.isfinite().all()
            close(got, slope)


def test_no_id_is_padding_unless_it_is_named(GPT=GPT):
    """Without ``pad_id`` id 0 is a token like any other; a row of nothing but padding gives finite numbers."""
    model, padding = make(GPT, pad_id=-1), make(GPT)
    close(model.hidden(row(0, 3, 0, 7))[0], f64(by_hand(model, [0, 3, 0, 7])))
    assert not torch.allclose(model.logits(row(0, 3)), padding.logits(row(0, 3)))
    assert padding.logits(torch.zeros(2, 3, dtype=torch.long)).isfinite().all()
    _, mask = padding._places(torch.tensor(PADDED), None)
    assert mask.any(-1).all()  # some attention kernels answer a row without any True with NaN


def test_only_real_tokens_count_towards_the_longest_sequence(GPT=GPT):
    model, tokens = make(GPT), [*range(1, 11), 1, 2]  # 12 = n_positions
    whole = model.logits(row(*tokens))
    try:
        close(model.logits(row(0, 0, 0, *tokens))[:, 3:], whole)
        close(model.logits(row(*tokens, 0, 0))[:, :12], whole)
    except ValueError as error:
        raise AssertionError("12 real tokens are not too many") from error
    for long in ([*tokens, 3], [0, *tokens, 3], [*tokens, 0, 3]):
        raises(ValueError, lambda t=long: model.logits(row(*t)), "tokens", "13", "12", "n_positions")


def split(model, tokens, *lengths):
    cache, parts = model.new_cache(len(tokens), 12), []
    for part in tokens.split(lengths, 1):
        parts.append(model.logits(part, cache))
    return torch.cat(parts, 1), cache


BATCHES = {
    "no padding": [[3, 7, 5, 9, 1, 2], [4, 4, 4, 8, 8, 8]],
    "on the left": [[0, 0, 5, 9, 1, 2], [4, 4, 4, 8, 8, 8]],
    "on the right": [[3, 7, 5, 0, 0, 0], [4, 4, 4, 8, 8, 8]],
    "a gap that comes late": [[3, 7, 5, 0, 0, 2], [4, 4, 4, 8, 8, 8]],
}


def test_cached_equals_uncached_however_the_tokens_are_cut(GPT=GPT, Block=Block):
    with replaced(gpt, Block=Block):
        model = make(GPT)
    for name, tokens in BATCHES.items():
        tokens = torch.tensor(tokens)
        real, whole = tokens != 0, model.logits(tokens)
        for lengths in ((6,), (3, 1, 1, 1), (1,) * 6, (2, 3, 1), (3, 3)):
            logits, cache = split(model, tokens, *lengths)
            assert torch.allclose(logits[real], whole[real]), (name, lengths)
            assert logits.isfinite().all() and cache.used == 6 and cache.real[:, :6].equal(real)


def test_the_cache_is_made_once_and_knows_its_limits(GPT=GPT):
    model, tokens = make(GPT), torch.tensor(BATCHES["on the left"])
    cache = model.new_cache(2, 6)
    assert cache.keys.shape == cache.values.shape == (2, 2, 2, 6, 4) and cache.keys.dtype == torch.float64
    places = cache.keys.data_ptr(), cache.values.data_ptr()
    with torch.no_grad():
        model.hidden(tokens, cache)
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == places and cache.keys.isfinite().all()
    raises(ValueError, lambda: model.hidden(tokens[:, :1], cache), "tokens", "(2, 1)", "6", "cache")
    raises(ValueError, lambda: model.hidden(tokens[:1], model.new_cache(2, 6)), "tokens", "(1, 6)", "(2, 6)")
    long = model.new_cache(1, 20)
    model.hidden(row(*range(1, 11)), long)
    raises(ValueError, lambda: model.hidden(row(1, 2, 3), long), "tokens", "13", "n_positions = 12")


def test_bf16_autocast_gives_about_the_same_and_a_cache_of_its_own_type(GPT=GPT):
    model, tokens = make(GPT).float(), torch.tensor(BATCHES["on the left"])
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        cache = model.new_cache(2, 6)
        first = model.logits(tokens[:, :4], cache)
        logits = torch.cat([first, model.logits(tokens[:, 4:], cache)], 1)
        whole = model.logits(tokens)
    assert cache.keys.dtype == torch.bfloat16 and whole.dtype == torch.bfloat16
    exact, real = model.logits(tokens), tokens != 0
    for got in (logits, whole):
        close(got[real].float(), exact[real], rtol=0.1, atol=0.15)  # 8 bits, logits of order 1 to 5


def test_weights_start_as_in_gpt2_from_the_global_generator(GPT=GPT):
    sizes = {"vocab_size": 400, "n_positions": 200, "n_embd": 128, "n_layer": 8, "n_head": 4}
    torch.manual_seed(1)
    model = GPT(GPTConfig(**sizes))
    torch.manual_seed(1)
    again, other = GPT(GPTConfig(**sizes)).state_dict(), GPT(GPTConfig(**sizes)).state_dict()
    for name, x in model.state_dict().items():
        assert x.equal(again[name]), name
        if name.endswith("bias"):
            assert (x == 0).all(), name
        elif "norm" in name:
            assert (x == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attention_out.weight", "down.weight")) else 0.02
            assert abs(x.std().item() / std - 1) < 6 / math.sqrt(2 * x.numel()), name
            assert abs(x.mean().item()) < 6 * std / math.sqrt(x.numel()), name
            assert not x.equal(other[name]), name
    entropy = torch.distributions.Categorical(logits=model.logits(row(1, 2, 3))).entropy()
    assert (entropy > 0.99 * math.log(400)).all()


def test_the_embedding_is_the_output_matrix_and_there_is_nothing_more(GPT=GPT):
    model = make(GPT)
    v, n, c, layers = 11, 12, 8, 2
    assert sum(p.numel() for p in model.parameters()) == v * c + n * c + layers * (12 * c * c + 13 * c) + 2 * c
    model.logits(row(3, 4)).sum().backward()
    assert (model.token_embedding.weight.grad.abs().sum(1) > 0).all()  # of tokens that were not read, too


def test_dropout_is_on_in_training_and_off_in_evaluation(Block=Block, GPT=GPT):
    for part in ("everything", "embedding", "block"):
        with replaced(gpt, Block=Block):
            model = make(GPT, dropout=0.5, n_layer=2 if part == "everything" else 1)
        if part == "embedding":
            for name in ("attention_out", "down"):
                getattr(model.blocks[0], name).weight.data.zero_()
                getattr(model.blocks[0], name).bias.data.zero_()
        if part == "block":
            model.token_embedding.weight.data.zero_()
            model.position_embedding.weight.data.zero_()
        tokens = row(*[3, 7, 5, 9] * 3)
        close(model.hidden(tokens), model.hidden(tokens))
        model.train()
        assert not torch.allclose(model.hidden(tokens), model.hidden(tokens)), part


def test_dropout_reaches_the_attention_weights_and_both_outputs(Block=Block):
    """With everything else switched off, each of the three alone makes two passes differ."""
    for part in ("weights", "attention", "mlp"):
        block = Block(GPTConfig(**SIZES | {"dropout": 0.5})).double()
        with torch.no_grad():
            for i, p in enumerate(block.parameters()):
                p.copy_(normal(*p.shape, seed=i))
        x = normal(1, 20, 8)
        calls = []

        def dropout(y, p, training, keep=part, calls=calls):
            calls.append((p, training))
            place = ("attention", "mlp")[(len(calls) - 1) % 2]
            return torch.dropout(y, p, training) if keep == place else y

        attention = gpt.F.scaled_dot_product_attention

        def attend(*a, keep=part, attention=attention, **k):
            return attention(*a, **k | ({} if keep == "weights" else {"dropout_p": 0.0}))

        with replaced(gpt.F, dropout=dropout, scaled_dot_product_attention=attend):
            same = block(x, None, None, 0).equal(block(x, None, None, 0))
        assert not same and calls == [(0.5, True)] * 4


def test_tokens_out_of_range_and_wrong_shapes_are_refused(GPT=GPT):
    model = make(GPT)
    raises(ValueError, lambda: model.logits(row(3, 11)), "tokens", "[3, 11]", "[0, 10]")
    raises(ValueError, lambda: model.logits(row(-1, 3)), "tokens", "[-1, 3]")
    raises(ValueError, lambda: model.logits(torch.tensor([3, 4])), "tokens", "(2,)", "(B, L)")
    raises(ValueError, lambda: model.logits(torch.zeros(2, 0, dtype=torch.long)), "tokens", "(2, 0)")


WRONG_SIZES = [
    {"vocab_size": 1},
    {"n_positions": 0},
    {"n_embd": 9},
    {"n_embd": 0},
    {"n_layer": 0},
    {"n_head": 0},
    {"dropout": 1.0},
    {"dropout": -0.1},
    {"pad_id": 11},
    {"pad_id": -2},
]


def test_config_refuses_sizes_that_make_no_model(GPTConfig=GPTConfig):
    assert GPTConfig(11, 12, 8, 2, 2) == GPTConfig(11, 12, 8, 2, 2, dropout=0.0, pad_id=-1)
    for wrong in WRONG_SIZES:
        ((name, value),) = wrong.items()
        raises(ValueError, lambda w=wrong: GPTConfig(**SIZES | w), name, str(value))
    GPTConfig(**SIZES | {"pad_id": 10, "dropout": 0.99})


def file():
    return Path(tempfile.mkdtemp()) / "model.safetensors"


def test_a_model_comes_back_from_its_file_without_drawing_a_number(GPT=GPT, ScalarModel=ScalarModel):
    path, tokens = file(), torch.tensor(PADDED)
    where = torch.get_default_device()
    policy = make(GPT, dropout=0.1)
    reward = ScalarModel(make()).double()
    for model, cls, call in (
        (policy, GPT, lambda m: m.logits(tokens)),
        (reward, ScalarModel, lambda m: m.scores(tokens)),
    ):
        model.save(path, {"seed": 7})
        assert load_checkpoint(path)[1]["info"] == {"seed": 7}
        before = torch.get_rng_state()
        found = cls.load(path, where)
        assert before.equal(torch.get_rng_state())
        assert type(found) is cls and {p.dtype for p in found.parameters()} == {torch.float64}
        assert all(p.requires_grad and p.device.type == where.type for p in found.parameters())
        assert call(found.eval()).equal(call(model))
    assert GPT.load is not ScalarModel.load
    policy.save(path)
    assert GPT.load(path).config == policy.config and load_checkpoint(path)[1]["info"] == {}


def test_a_file_that_does_not_fit_is_refused(GPT=GPT, ScalarModel=ScalarModel):
    path = file()
    model = make(GPT)
    model.save(path)
    raises(ValueError, lambda: ScalarModel.load(path), "path", "GPT", "ScalarModel")
    tensors, config = load_checkpoint(path)
    ScalarModel(make()).save(path)
    raises(ValueError, lambda: GPT.load(path), "path", "ScalarModel")
    save_checkpoint(path, tensors, {**config, "config": config["config"] | {"vocab_size": 12}})
    raises(ValueError, lambda: GPT.load(path), "token_embedding.weight", "(11, 8)", "(12, 8)")
    save_checkpoint(path, {k: v for k, v in tensors.items() if k != "norm.bias"}, config)
    raises(ValueError, lambda: GPT.load(path), "norm.bias", "nothing")
    save_checkpoint(path, tensors | {"more": torch.ones(1)}, config)
    raises(ValueError, lambda: GPT.load(path), "more", "(1,)")
    save_checkpoint(path, tensors, {**config, "config": {"vocab_size": 11}})
    raises(ValueError, lambda: GPT.load(path), "config", "n_embd")
    save_checkpoint(path, tensors, {"step": 3})
    raises(ValueError, lambda: GPT.load(path), "path", "None", "GPT")


def scalar(ScalarModel=ScalarModel, **settings):
    model = ScalarModel(make(), **settings).double()
    with torch.no_grad():
        model.head.weight.copy_(normal(1, 8, seed=5))
        model.head.bias.fill_(0.3)
    return model


def test_the_score_is_the_scalar_at_the_last_real_token(ScalarModel=ScalarModel):
    model, tokens = scalar(ScalarModel), torch.tensor(PADDED)
    hidden = by_hand(model.trunk, [3, 7, 5, 9])
    values = f64([sum(a * b for a, b in zip(h, normal(8, seed=5).tolist(), strict=True)) + 0.3 for h in hidden])
    close(model.scores(tokens), values[3].expand(4))
    close(model.values(tokens)[tokens != 0].view(4, 4), values.expand(4, 4))
    close(model.from_hidden(model.trunk.hidden(tokens)), model.values(tokens))
    close(model(tokens), model.values(tokens))
    without = scalar(ScalarModel)
    without.trunk.pad_id = -1
    close(without.scores(tokens)[1:3], without.values(tokens)[1:3, -1])


def test_a_mask_says_which_token_is_the_last(ScalarModel=ScalarModel):
    model, tokens = scalar(ScalarModel), row(3, 7, 5, 9, 0).repeat(3, 1)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 1, 0, 0]]).bool()
    values = model.values(tokens)
    close(model.scores(tokens, mask), values[[0, 1, 2], [1, 3, 2]])
    raises(ValueError, lambda: model.scores(tokens, mask & (values < -1e9)), "mask", "row 0")
    raises(ValueError, lambda: model.scores(tokens, mask.long()), "mask", "torch.int64")
    raises(ValueError, lambda: model.scores(tokens, mask[:1]), "mask", "(1, 5)")
    raises(ValueError, lambda: model.scores(torch.tensor([[3, 4], [0, 0]])), "tokens", "row 1")


def test_the_head_starts_as_asked_and_the_trunk_is_shared(ScalarModel=ScalarModel):
    torch.manual_seed(0)
    trunk = GPT(GPTConfig(**SIZES | {"n_embd": 800}))
    for setting, std in (({}, 1 / math.sqrt(801)), ({"head_std": 0.0}, 0.0), ({"head_std": 2.0}, 2.0)):
        model = ScalarModel(trunk, **setting)
        weight = model.head.weight.flatten()
        assert model.head.bias.item() == 0 and abs(weight.std().item() - std) <= 0.15 * std
    assert model.trunk is trunk and (ScalarModel(trunk, 0.0).values(row(3, 4)) == 0).all()
    model.scores(row(3, 4)).sum().backward()
    slope = trunk.token_embedding.weight.grad
    assert slope is not None and slope.abs().sum() > 0
    assert ScalarModel(make()).head.weight.dtype == torch.float64
    raises(ValueError, lambda: ScalarModel(trunk, -1.0), "head_std", "-1.0")


def _gpt(*changes):
    return edited(GPT, *changes)


def _block(*changes):
    return edited(Block, *changes)


PLANTED = {
    "GPT": {
        "no positions": _gpt((" + self.position_embedding(positions)", "")),
        "no last layer norm": _gpt(("return self.norm(x)", "return x")),
        "embedding scaled": _gpt(
            ("self.token_embedding(tokens) +", "math.sqrt(self.config.n_embd) * self.token_embedding(tokens) +")
        ),
        "output not tied": _gpt(("self.token_embedding.weight)", "self.token_embedding.weight.detach())")),
        "padding takes positions": _gpt(("real.cumsum(1) - real.long()", "columns.expand_as(real)")),
        "position counts the token itself": _gpt(("(real.cumsum(1) - real.long())", "real.cumsum(1)")),
        "padding is seen": _gpt(
            (
                "(real[:, None, None] & (columns <= rows))",
                "(columns <= rows).expand_as(real[:, None, None] & (columns <= rows))",
            )
        ),
        "nothing to look at gives NaN": _gpt((" | (columns == rows)", "")),
        "mask forgets the future": _gpt(
            ("real[:, None, None] & (columns <= rows)", "real[:, None, None] & (rows == rows)")
        ),
        "only padding on the left is noticed": _gpt(
            ("bool((real[:, 1:] & ~real[:, :-1]).any())", "bool((~real[:, 0]).any())")
        ),
        "padding never noticed": _gpt(("gap = gap or (", "gap = False and (")),
        "cached: position starts again": _gpt(("else columns[start:])", "else columns[: tokens.shape[1]])")),
        "cached: a gap is forgotten": _gpt(
            ("            cache.gap = gap\n", "            cache.gap = not start and gap\n"),
            ("gap = gap or (self.pad_id >= 0", "gap = gap or (self.pad_id >= 0 and not start"),
        ),
        "cached: several new tokens without a mask": _gpt(
            ("if not gap and (start == 0 or tokens.shape[1] == 1):", "if not gap:")
        ),
        "cached: what was padding is forgotten": _gpt(
            ("            cache.real[:, start:end] = real\n", "            cache.real[:, start:end] = True\n")
        ),
        "cache not advanced": _gpt(("cache.used += tokens.shape[1]", "cache.used += 1")),
        "cache of the weights' type": _gpt(
            (
                "dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype",
                "dtype = weight.dtype",
            )
        ),
        "ids not checked": _gpt(
            ('            raise ValueError(f"tokens: got ids', '            print(f"tokens: got ids')
        ),
        "padding counts as length": _gpt(("longest := int(real.sum(1).max())", "longest := real.shape[1]")),
        "length not checked": _gpt(("if real.shape[1] > limit and", "if False and")),
        "residual projections not scaled": _gpt(
            ("0.02 / math.sqrt(2 * config.n_layer) if into_stream else 0.02", "0.02")
        ),
        "scaled by the layers, not twice": _gpt(("math.sqrt(2 * config.n_layer)", "math.sqrt(config.n_layer)")),
        "biases as torch has them": _gpt(("nn.init.zeros_(parameter)", "pass")),
        "embeddings N(0, 1)": _gpt(
            ("elif parameter.ndim == 2:", 'elif parameter.ndim == 2 and "embedding" not in name:')
        ),
        "dropout of the embeddings left on": _gpt(
            ("self.config.dropout, self.training)", "self.config.dropout, True)")
        ),
        "no dropout of the embeddings": _gpt(("        x = F.dropout(x, self.config.dropout, self.training)\n", "")),
        "info not saved": _gpt(("self.config, info)", "self.config, None)")),
    },
    "Block": {
        "post-norm": _block(
            ("self.qkv(self.norm_1(x))", "self.qkv(x)"),
            (
                "x = x + F.dropout(self.attention_out(mixed.transpose(1, 2).flatten(2)), drop, self.training)",
                "x = self.norm_1(x + self.attention_out(mixed.transpose(1, 2).flatten(2)))",
            ),
        ),
        "exact GELU": _block((', approximate="tanh"', "")),
        "ReLU": _block(('F.gelu(self.up(self.norm_2(x)), approximate="tanh")', "F.relu(self.up(self.norm_2(x)))")),
        "one norm for both": _block(("self.norm_2(x)", "self.norm_1(x)")),
        "no residual": _block(("return x + F.dropout(mlp", "return F.dropout(mlp")),
        "keys and queries swapped": _block(("q, k, v = self.qkv", "k, q, v = self.qkv")),
        "heads interleaved": _block(
            ("(3, self.n_head, -1)).permute(2, 0, 3, 1, 4)", "(3, -1, self.n_head)).permute(2, 0, 4, 1, 3)")
        ),
        "heads joined in the wrong order": _block(
            ("mixed.transpose(1, 2).flatten(2)", "mixed.permute(0, 2, 3, 1).flatten(2)")
        ),
        "not scaled": _block(("is_causal=causal)", "is_causal=causal, scale=1.0)")),
        "sees the future": _block(("is_causal=causal)", "is_causal=False)")),
        "mask ignored": _block(("attn_mask=mask", "attn_mask=None"), ("mask is None and x", "x")),
        "cached: the last token only": _block(
            (
                "cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]",
                "cache.keys[layer, :, :, end - 1 : end], cache.values[layer, :, :, end - 1 : end]",
            )
        ),
        "cached: one layer for all": _block(
            ("cache.values[layer, :, :, cache.used : end] = k, v", "cache.values[0, :, :, cache.used : end] = k, v")
        ),
        "cached: always written at the start": _block(
            ("cache.values[layer, :, :, cache.used : end] = k, v", "cache.values[layer, :, :, : x.shape[1]] = k, v")
        ),
        "dropout left on": _block(("drop = self.dropout if self.training else 0.0", "drop = self.dropout")),
        "no dropout of the attention weights": _block(("dropout_p=drop", "dropout_p=0.0")),
        "no dropout of the output": _block(("return x + F.dropout(mlp, drop, self.training)", "return x + mlp")),
    },
    "GPTConfig": {
        "heads need not divide the width": edited(GPTConfig, ("if self.n_embd % self.n_head:", "if False:")),
        "sizes not checked": edited(GPTConfig, ("if not getattr(self, name) >= least:", "if False:")),
        "dropout of 1": edited(GPTConfig, ("0 <= self.dropout < 1", "0 <= self.dropout <= 1")),
        "padding outside the vocabulary": edited(
            GPTConfig, ("-1 <= self.pad_id < self.vocab_size", "-1 <= self.pad_id")
        ),
        "id 0 is padding by default": edited(GPTConfig, ("pad_id: int = -1", "pad_id: int = 0")),
    },
    "ScalarModel": {
        "the last column": edited(
            ScalarModel, ("hidden[torch.arange(len(last), device=last.device), last]", "hidden[:, -1]")
        ),
        "the first real token": edited(
            ScalarModel, ("(mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)", "mask.long().argmax(1)")
        ),
        "as many as there are real tokens": edited(
            ScalarModel, ("(mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)", "mask.sum(1) - 1")
        ),
        "one before the last": edited(ScalarModel, ("device=last.device), last]", "device=last.device), last - 1]")),
        "mask ignored": edited(ScalarModel, ("        if mask is None:\n", "        if True:\n")),
        "empty rows score something": edited(ScalarModel, ("if not mask.any(1).all():", "if False:")),
        "no bias": edited(
            ScalarModel, ("return self.head(hidden).squeeze(-1)", "return (hidden @ self.head.weight.T).squeeze(-1)")
        ),
        "starts as a linear layer": edited(ScalarModel, ("        nn.init.normal_(self.head.weight, std=std)\n", "")),
        "bias starts anywhere": edited(ScalarModel, ("        nn.init.zeros_(self.head.bias)\n", "")),
        "std of C, not 1 / sqrt(C + 1)": edited(
            ScalarModel, ("1 / math.sqrt(trunk.config.n_embd + 1)", "1 / (trunk.config.n_embd + 1)")
        ),
        "trunk frozen": edited(
            ScalarModel, ("hidden = self.trunk.hidden(tokens)", "hidden = self.trunk.hidden(tokens).detach()")
        ),
        "zero means default": edited(
            ScalarModel, ("if head_std is None else head_std", "if not head_std else head_std")
        ),
    },
}
EXEMPT = {"KVCache"}  # holds tensors, does nothing
