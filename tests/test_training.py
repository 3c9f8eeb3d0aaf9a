"""What the loops share: batches, learning rate, sequences without gaps, and runs that stop and go on unharmed."""

import math
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from tqdm.auto import tqdm

from planting import close, edited, f64, raises
from rlhfkit.checkpoints import load_checkpoint, save_checkpoint
from rlhfkit.models import GPT, GPTConfig
from rlhfkit.training import (
    Run,
    batch_of_step,
    bf16_autocast,
    cosine_lr,
    decayed,
    device_of,
    join_right_padded,
    pad_to_one_width,
    require_finite,
    update,
)

# --- what the loops share ----------------------------------------------------------------------------------------


def test_bf16_is_for_matrix_products_and_only_if_asked_for(bf16_autocast=bf16_autocast):
    x = torch.full((2, 2), 1.001)
    with bf16_autocast(torch.device("cpu"), True):
        product, total = x @ x, x.sum()
    assert (product.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    with bf16_autocast(torch.device("cpu"), False):
        assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def test_matrices_decay_and_vectors_do_not(decayed=decayed):
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(4, 3))
    groups = decayed(model.named_parameters(), 0.3)
    by_decay = {group["weight_decay"]: [id(p) for p in group["params"]] for group in groups}
    assert by_decay == {
        0.3: [id(model[0].weight), id(model[2].weight)],
        0.0: [id(model[0].bias), id(model[1].weight), id(model[1].bias)],
    }
    assert len(groups) == 2


# --- sequences ---------------------------------------------------------------------------------------------------

PROMPTS = torch.tensor([[0, 0, 5], [2, 3, 4], [0, 6, 2]])
RESPONSES = torch.tensor([[7, 8, 1, 0], [1, 0, 0, 0], [3, 1, 0, 0]])


def test_joined_by_hand(join_right_padded=join_right_padded):
    tokens, mask = join_right_padded(PROMPTS, RESPONSES, 0)
    assert tokens.tolist() == [[5, 7, 8, 1], [2, 3, 4, 1], [6, 2, 3, 1]]
    assert mask.int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    tokens, mask = join_right_padded(PROMPTS[:2] + 1, torch.tensor([[8, 9, 2], [2, 1, 1]]), 1)
    assert tokens.tolist() == [[6, 8, 9, 2], [3, 4, 5, 2]] and mask.int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    ragged = join_right_padded(torch.tensor([[0, 5], [2, 3]]), torch.tensor([[1, 0, 0], [4, 4, 1]]), 0)
    assert ragged[0].tolist() == [[5, 1, 0, 0, 0], [2, 3, 4, 4, 1]]
    assert ragged[1].int().tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]
    whole = join_right_padded(PROMPTS, RESPONSES, -1)
    assert whole[0].equal(torch.cat([PROMPTS, RESPONSES], 1)) and whole[1].sum(1).tolist() == [4, 4, 4]


def test_joined_sequences_have_the_log_probabilities_of_the_gapped_ones(join_right_padded=join_right_padded):
    torch.manual_seed(0)
    model = GPT(GPTConfig(10, 12, 8, 2, 2, pad_id=0)).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    found = []
    for tokens, mask in (
        join_right_padded(PROMPTS, RESPONSES, 0),
        (torch.cat([PROMPTS, RESPONSES], 1), torch.cat([PROMPTS.bool() & False, RESPONSES != 0], 1)),
    ):
        logprobs = model.logits(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        found.append(logprobs[mask[:, 1:]].detach())
    assert found[0].shape == (6,)
    close(*found)


def test_joining_other_shapes_is_refused(join_right_padded=join_right_padded):
    for prompts, responses in ((PROMPTS[:2], RESPONSES), (PROMPTS[0], RESPONSES), (PROMPTS, RESPONSES[0])):
        words = (str(tuple(prompts.shape)), str(tuple(responses.shape)), "(B, L0)")
        raises(ValueError, lambda p=prompts, r=responses: join_right_padded(p, r, 0), *words)


def test_rows_of_several_widths_fit_in_one_tensor(pad_to_one_width=pad_to_one_width):
    parts = [torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.tensor([[9]])]
    assert pad_to_one_width(parts, 0).tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 8], [9, 0, 0]]
    assert pad_to_one_width(parts[::2], 7).tolist() == [[1, 2], [9, 7]]
    assert pad_to_one_width(parts[1:2], 0).equal(parts[1])


def test_the_device_is_that_of_the_parameters_and_the_cpu_without_any(device_of=device_of):
    assert device_of(nn.Linear(2, 1, device="meta")) == torch.device("meta")
    assert device_of(nn.Linear(2, 1)) == device_of(nn.Sequential()) == device_of(object()) == torch.device("cpu")
    with torch.device("meta"):
        assert device_of(nn.Linear(2, 1, device="cpu")) == device_of(object()) == torch.device("cpu")


# --- batches and learning rate -----------------------------------------------------------------------------------


def lengths_of(count):
    return tuple(torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(count)).tolist())


def epoch(batch_of_step, lengths, size, seed, number):
    per_epoch = max(1, len(lengths) // size)
    return [batch_of_step(lengths, size, seed, number * per_epoch + i).tolist() for i in range(per_epoch)]


def test_every_row_comes_once_an_epoch_and_what_does_not_fill_a_batch_is_left_out(batch_of_step=batch_of_step):
    for count, size in ((640, 4), (96, 32), (1000, 3), (7, 2), (5, 5), (3, 8), (1, 1)):
        lengths = lengths_of(count)
        for number in (0, 1, 5):
            batches = epoch(batch_of_step, lengths, size, 0, number)
            rows = [row for batch in batches for row in batch]
            expected = count // size * size or count
            assert len(rows) == len(set(rows)) == expected and set(rows) <= set(range(count)), (count, size)
            assert {len(batch) for batch in batches} == {min(size, count)}


def test_no_row_is_left_out_for_ever(batch_of_step=batch_of_step):
    """The rows that do not fill a batch are others in every epoch, the longest as often as the shortest."""
    for count, size, epochs in ((40, 32, 60), (11, 4, 60), (70, 4, 60)):
        lengths = lengths_of(count)
        seen = [0] * count
        for number in range(epochs):
            for batch in epoch(batch_of_step, lengths, size, 0, number):
                for row in batch:
                    seen[row] += 1
        left_out = count % size / count  # of every row, each epoch, independently
        bound = 5 * math.sqrt(epochs * left_out * (1 - left_out))
        assert max(abs(x - epochs * (1 - left_out)) for x in seen) < bound, (count, size, seen)


def test_a_batch_is_a_pure_function_of_seed_and_step(batch_of_step=batch_of_step):
    lengths, before = lengths_of(64), torch.get_rng_state()
    forwards = [batch_of_step(lengths, 4, 3, step).tolist() for step in range(40)]
    batch_of_step(lengths_of(50), 5, 9, 77)  # and another run in between
    assert [batch_of_step(lengths, 4, 3, step).tolist() for step in reversed(range(40))] == forwards[::-1]
    assert torch.get_rng_state().equal(before)
    first, second, other = forwards[:16], forwards[16:32], epoch(batch_of_step, lengths, 4, 4, 0)
    assert sorted(map(sorted, first)) != sorted(map(sorted, second)) and first != other
    assert not any(
        epoch(batch_of_step, lengths, 4, s, 1) == epoch(batch_of_step, lengths, 4, s + 1, 0) for s in range(5)
    )


def test_rows_of_similar_length_come_together_and_batches_in_no_order(batch_of_step=batch_of_step):
    lengths = lengths_of(2048)
    batches = epoch(batch_of_step, lengths, 8, 0, 0)
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)  # in random batches it is 1.6 times
    widths = f64([max(lengths[i] for i in batch) for batch in batches])
    neighbours = torch.corrcoef(torch.stack([widths[1:], widths[:-1]]))[0, 1]
    assert abs(neighbours) < 5 / math.sqrt(len(widths))


def test_the_learning_rate_rises_in_equal_steps_and_falls_as_a_cosine(cosine_lr=cosine_lr):
    """The fall: half-way it is half, after a third three quarters, and what it lacks it lacks symmetrically."""
    rate = [cosine_lr(step, 112, 0.4, 10) for step in range(113)]
    close(f64([0.0, *rate[:11]]).diff(), torch.full((11,), 0.4 / 11, dtype=torch.float64))
    close(f64([rate[10], rate[10 + 34], rate[10 + 51], rate[10 + 68], rate[112]]), f64([0.4, 0.3, 0.2, 0.1, 0.0]))
    close(f64(rate[10:]) + f64(rate[10:][::-1]), torch.full((103,), 0.4, dtype=torch.float64))
    assert (f64(rate[10:]).diff() < 0).all() and min(rate[:112]) > 0
    assert cosine_lr(0, 5, 2.0, 0) == 2.0 and cosine_lr(0, 1, 2.0, 0) == 2.0 and cosine_lr(3, 3, 2.0, 3) == 2.0


# --- one update ---------------------------------------------------------------------------------------------------


def test_require_finite_names_what_step_and_value(require_finite=require_finite):
    for dtype in (torch.float32, torch.float64):
        finite = torch.tensor([[0.0, -1e30]], dtype=dtype)
        raises(ZeroDivisionError, lambda x=finite: (require_finite("loss", x, 3), 1 / 0))  # gets past the check
        for junk in ("nan", "inf", "-inf"):
            x = torch.tensor([0.0, float(junk)], dtype=dtype)
            raises(
                FloatingPointError, lambda x=x: require_finite("some gradient", x, 7), "step 7", "some gradient", junk
            )
            raises(FloatingPointError, lambda x=x: require_finite("loss", x[1], 0), "step 0", "loss", junk)


def quadratic(start=(3.0, 4.0)):
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(f64([start]))
    return model, lambda: model.weight.square().sum() / 2  # its gradient is the weight itself


def test_an_update_is_a_clipped_step_and_says_the_norm_before(update=update):
    for max_norm, scale in ((10.0, 1.0), (1.0, 0.2)):
        model, loss = quadratic()
        model.weight.grad = f64([[100.0, 100.0]])  # of an earlier step
        slow, fast = (
            torch.optim.SGD([{"params": model.parameters(), **extra}], lr=9.0) for extra in ({}, {"lr_scale": 3.0})
        )
        norm = update(model, [slow], loss(), 0.1, 0, max_norm)
        close(norm, f64(5.0))
        close(model.weight.detach(), f64([[3.0, 4.0]]) * (1 - 0.1 * scale), rtol=1e-5, atol=1e-6)  # + 1e-6 in torch
        model, loss = quadratic()
        slow, fast = (
            torch.optim.SGD([{"params": model.parameters(), **extra}], lr=9.0) for extra in ({}, {"lr_scale": 3.0})
        )
        update(model, [slow, fast], loss(), 0.1, 0, max_norm)
        close(model.weight.detach(), f64([[3.0, 4.0]]) * (1 - 0.4 * scale), rtol=1e-5, atol=1e-6)


def test_an_update_that_is_not_finite_changes_nothing(update=update):
    for quantity, spoil in (
        ("loss", lambda loss: loss * math.inf),
        ("loss", lambda loss: loss * math.nan),
        ("gradient norm", lambda loss: loss + 0 * (loss - loss.detach()).abs().sqrt()),
    ):
        model, loss = quadratic()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        spoilt = spoil(loss())
        call = lambda m=model, o=optimizer, x=spoilt: update(m, [o], x, 0.1, 17, 1.0)  # noqa: E731
        raises(FloatingPointError, call, "step 17", quantity)
        assert model.weight.tolist() == [[3.0, 4.0]]


# --- runs --------------------------------------------------------------------------------------------------------

RECIPE = {"lr": 0.1, "seed": 0, "betas": (0.9, 0.99)}


class Stop(Exception):
    pass


def model_of(width=4):
    """The first matrix is stored by columns, as in a GPT: moments of another layout would be mixed up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.4), nn.Linear(width, 2))
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    return model


def learn(Run, path, total, save_every, stop=None, when="after"):
    """A loop with dropout and two optimisers of different kinds, from the same start; ``stop``: dies in that step."""
    model = model_of()
    optimizers = [
        torch.optim.AdamW(model[0].parameters(), lr=0.1, fused=True),
        torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9),
    ]
    x = torch.arange(12.0).view(4, 3) / 10
    torch.manual_seed(1)
    run = Run(model, optimizers, RECIPE, path, save_every)
    done = []
    for step in run.steps(total, "test"):
        if stop == step and when == "before":
            raise Stop
        loss = (model(x) * torch.randn(4, 2)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if stop == step and when == "between":
            raise Stop
        run.log({"loss": loss, "twice": 2 * loss.item()})
        done.append(step)
        if stop == step and when == "after":
            raise Stop
    return model, run, done


def outcome(model, run):
    return [p.detach().clone() for p in model.parameters()], run.history


def test_a_run_stopped_anywhere_ends_with_the_same_weights(Run=Run):
    """Bit for bit, for every step, before, in and after the update, once or three times."""
    with tempfile.TemporaryDirectory() as folder:
        whole, history = outcome(*learn(Run, Path(folder) / "whole", 8, 3)[:2])
        assert [sorted(row) for row in history] == [["loss", "twice"]] * 8
        for when in ("before", "between", "after"):
            for stop in range(8):
                path = Path(folder) / f"{when}{stop}"
                for _ in range(1 + 2 * (stop == 4)):
                    try:
                        learn(Run, path, 8, 3, stop, when)
                    except Stop:
                        pass
                    torch.manual_seed(stop)  # what came between has used random numbers
                model, run, done = learn(Run, path, 8, 3)
                weights, again = outcome(model, run)
                assert all(a.equal(b) for a, b in zip(weights, whole, strict=True)), (when, stop)
                assert again == history and done == list(range(8))[-len(done) :]
                assert len(done) == 8 - stop // 3 * 3


def draws(Run, path, stop=None, seed=3, total=6):
    """A run whose metrics are what its generator gives."""
    generator = torch.Generator().manual_seed(seed)
    model = model_of()
    run = Run(model, [torch.optim.SGD(model.parameters(), lr=0.1)], RECIPE, path, 2, generator)
    for step in run.steps(total, "test"):
        run.log({"drawn": torch.rand(1, generator=generator, dtype=torch.float64)})
        if step == stop:
            raise Stop
    return run.history, torch.rand(1, generator=generator).item()


def test_a_stopped_run_goes_on_with_the_draws_of_its_generator(Run=Run):
    """Whatever state the generator is in when it is handed over, and without touching the global one."""
    with tempfile.TemporaryDirectory() as folder:
        whole = draws(Run, None)
        assert whole != draws(Run, None, seed=4) and len({row["drawn"] for row in whole[0]}) == 6
        for stop in range(6):
            path = Path(folder) / f"{stop}"
            try:
                draws(Run, path, stop)
            except Stop:
                pass
            found = draws(Run, path, seed=3 + stop % 2 * (stop >= 2))  # before the first save there is no file
            assert found == whole, stop
        assert draws(Run, path, seed=8) == whole
        without = load_checkpoint(Path(folder) / "5")[0]
        assert without["random/generator"].dtype == torch.uint8
        learn(Run, Path(folder) / "plain", 4, 2)
        assert "random/generator" not in load_checkpoint(Path(folder) / "plain")[0]


def test_the_progress_bar_shows_the_first_metric(Run=Run):
    for metrics, shown in (
        ({"loss": 0.5, "lr": 3.0}, "loss 0.500"),
        ({"score": torch.tensor(-2.0), "loss": 1.0}, "score -2.000"),
    ):
        run, said = Run(model_of(), [], {}, None, 1), []
        with mock.patch.object(tqdm, "set_postfix_str", lambda self, text, refresh, said=said: said.append(text)):
            for _ in run.steps(2, "test"):
                run.log(metrics)
        assert said == [shown] * 2


def test_a_finished_run_is_read_and_not_repeated(Run=Run):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        first, history = outcome(*learn(Run, path, 5, 100)[:2])
        model, run, done = learn(Run, path, 5, 100)
        assert done == [] and all(a.equal(b) for a, b in zip(first, outcome(model, run)[0], strict=True))
        assert run.history == history and all(isinstance(x, float) for row in history for x in row.values())


def test_without_a_file_nothing_is_written(Run=Run):
    model, run, done = learn(Run, None, 4, 1)
    assert done == [0, 1, 2, 3] and len(run.history) == 4
    assert all(type(x) is float for row in run.history for x in row.values())
    with tempfile.TemporaryDirectory() as folder:
        learn(Run, Path(folder) / "run", 4, 1)
        weights = outcome(*learn(Run, Path(folder) / "run", 4, 1)[:2])[0]
        assert all(a.equal(b) for a, b in zip(weights, outcome(model, run)[0], strict=True))
        assert [p.name for p in Path(folder).iterdir()] == ["run"]


def test_it_saves_every_so_many_steps_and_at_the_end(Run=Run):
    with tempfile.TemporaryDirectory() as folder:
        path, written = Path(folder) / "run", []
        run = Run(model_of(), [], RECIPE, path, 3)
        for step in run.steps(8, "test"):
            written.append((step, path.exists() and path.stat().st_mtime_ns))
            run.log({"loss": 0.0})
        stamps = [stamp for _, stamp in written]
        assert stamps[:3] == [False] * 3 and len(set(stamps)) == 3
        assert stamps[3] == stamps[5] != stamps[6] == stamps[7] != path.stat().st_mtime_ns


def test_files_of_other_runs_are_refused_and_left_alone(Run=Run):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        learn(Run, path, 4, 2)
        before = path.read_bytes()

        def open_it(**changes):
            model = model_of()
            weights = [p.detach().clone() for p in model.parameters()]
            try:
                return Run(model, [torch.optim.SGD(model.parameters(), lr=0.1)], RECIPE | changes, path, 2)
            finally:
                assert all(a.equal(b) for a, b in zip(weights, model.parameters(), strict=True))

        raises(ValueError, lambda: open_it(lr=0.2), "another recipe", "lr 0.1 there, 0.2 here", str(path))
        raises(ValueError, lambda: open_it(extra=1), "extra None there, 1 here")
        raises(ValueError, lambda: open_it(betas=(0.9, 0.95)), "betas [0.9, 0.99] there, [0.9, 0.95] here")
        raises(ValueError, lambda: Run(model_of(5), [], RECIPE, path, 2), "does not fit the model", str(path))
        for damaged in (before[:-1], before[:10], before[:-9] + bytes([before[-9] ^ 1]) + before[-8:], b""):
            path.write_bytes(damaged)
            raises(ValueError, open_it, str(path))
        path.write_bytes(before)
        learn(Run, path, 4, 2)
        assert path.read_bytes() == before
        save_checkpoint(path, {"weight": torch.zeros(2)}, {"kind": "GPT"})
        raises(ValueError, open_it, "GPT", "an unfinished run")


def test_a_loop_that_does_not_log_once_a_step_is_stopped(Run=Run):
    for count in (0, 2):
        run = Run(model_of(), [], {}, None, 1)

        def loop(run=run, count=count):
            for _ in run.steps(3, "test"):
                for _ in range(count):
                    run.log({"loss": 0.0})

        raises(RuntimeError, loop, "step 0", "log()")
    for bad in (0, -1):
        raises(ValueError, lambda b=bad: Run(model_of(), [], {}, None, b), "save_every", str(bad))


def _run(*changes):
    return edited(Run, *changes)


def _batches(change):
    """Another choice of rows, from the batch that is right."""
    return lambda lengths, size, seed, step: change(lengths, size, seed, step)


def _random_batches(lengths, size, seed, step):
    per_epoch = max(1, len(lengths) // size)
    generator = torch.Generator().manual_seed(seed * 1000 + step // per_epoch)
    return torch.randperm(len(lengths), generator=generator).split(size)[step % per_epoch]


def _sorted_batches(lengths, size, seed, step):
    per_epoch = max(1, len(lengths) // size)
    generator = torch.Generator().manual_seed(seed * 1000 + step // per_epoch)
    order = torch.randperm(len(lengths), generator=generator)[: per_epoch * size]
    return order[torch.tensor(lengths)[order].argsort(stable=True)].split(size)[step % per_epoch]


PLANTED = {
    "bf16_autocast": {
        "always": lambda device, bf16: bf16_autocast(device, True),
        "never": lambda device, bf16: bf16_autocast(device, False),
        "turned": lambda device, bf16: bf16_autocast(device, not bf16),
        "in double": lambda device, bf16: torch.autocast(device.type, torch.float16, enabled=bf16),
    },
    "decayed": {
        "everything": edited(decayed, ('"weight_decay": 0.0', '"weight_decay": weight_decay')),
        "vectors": edited(decayed, ("p.ndim >= 2", "p.ndim < 2"), ("if p.ndim < 2]\n", "if p.ndim >= 2]\n")),
        "vectors are lost": lambda named, weight_decay: decayed(named, weight_decay)[:1],
        "nothing": lambda named, weight_decay: decayed(named, 0.0),
    },
    "join_right_padded": {
        "gaps stay": lambda p, r, pad: (torch.cat([p, r], 1), torch.cat([p != p, r != pad], 1)),
        "the end token does not count": lambda p, r, pad: (lambda t, m: (t, m & (t != 1)))(
            *join_right_padded(p, r, pad)
        ),
        "the last prompt token counts": edited(join_right_padded, (">= prompts.shape[1]", ">= prompts.shape[1] - 1")),
        "padding counts": edited(join_right_padded, ("(real & in_response)", "in_response.expand_as(real)")),
        "the mask stays where it was": edited(
            join_right_padded, ("(real & in_response).gather(1, order)", "(real & in_response)[:, : order.shape[1]]")
        ),
        "padding is always 0": lambda p, r, pad: join_right_padded(p, r, 0),
        "order lost": lambda p, r, pad: (lambda t, m: (t.sort(descending=True)[0], m))(*join_right_padded(p, r, pad)),
        "cut to the shortest": edited(join_right_padded, ("real.sum(1).max()", "real.sum(1).min()")),
        "rows not compared": edited(join_right_padded, ("or len(prompts) != len(responses)", "")),
    },
    "pad_to_one_width": {
        "on the left": edited(pad_to_one_width, ("(0, width - part.shape[1])", "(width - part.shape[1], 0)")),
        "with 0": lambda parts, pad_id: pad_to_one_width(parts, 0),
        "cut to the narrowest": lambda parts, pad_id: torch.cat(
            [p[:, : min(q.shape[1] for q in parts)] for p in parts]
        ),
        "one column more": lambda parts, pad_id: nn.functional.pad(
            pad_to_one_width(parts, pad_id), (0, 1), value=pad_id
        ),
    },
    "device_of": {
        "always the processor": lambda policy: torch.device("cpu"),
        "the default": lambda policy: torch.get_default_device(),
        "its name": lambda policy: str(device_of(policy)),
        "the default where there are no parameters": lambda policy: (
            device_of(policy) if list(getattr(policy, "parameters", list)()) else torch.get_default_device()
        ),
    },
    "batch_of_step": {
        "the same order every epoch": _batches(
            lambda n, size, seed, step: batch_of_step(n, size, seed, step % max(1, len(n) // size))
        ),
        "with replacement": _batches(
            lambda n, size, seed, step: torch.randint(
                len(n), (min(size, len(n)),), generator=torch.Generator().manual_seed(step)
            )
        ),
        "global random numbers": _batches(
            lambda n, size, seed, step: (torch.rand(1), batch_of_step(n, size, seed, step))[1]
        ),
        "the seed does not matter": _batches(lambda n, size, seed, step: batch_of_step(n, size, 0, step)),
        "seed and epoch add up": _batches(
            lambda n, size, seed, step: batch_of_step(n, size, 0, step + seed * max(1, len(n) // size))
        ),
        "lengths do not matter": _random_batches,
        "from short to long": _sorted_batches,
        "in the order of the file": _batches(
            lambda n, size, seed, step: torch.arange(len(n)).split(size)[step % max(1, len(n) // size)]
        ),
        "incomplete batches too": _batches(
            lambda n, size, seed, step: torch.arange(len(n)).split(size)[step % -(-len(n) // size)]
        ),
        "too few rows give nothing": _batches(
            lambda n, size, seed, step: batch_of_step(n, size, seed, step)[: len(n) // size * size]
        ),
    },
    "cosine_lr": {
        "linear fall": lambda step, steps, peak, warmup: (
            cosine_lr(step, steps, peak, warmup) if step < warmup else peak * (steps - step) / max(1, steps - warmup)
        ),
        "no warm-up": lambda step, steps, peak, warmup: cosine_lr(max(step, warmup), steps, peak, warmup),
        "cosine from step 0": edited(cosine_lr, ("(step - warmup) / max(1, steps - warmup)", "step / steps")),
        "a whole cosine": edited(cosine_lr, ("math.pi * (step", "2 * math.pi * (step")),
        "a quarter of a cosine": lambda step, steps, peak, warmup: (
            cosine_lr(step, steps, peak, warmup)
            if step < warmup
            else peak * math.cos(math.pi / 2 * (step - warmup) / max(1, steps - warmup))
        ),
        "starts at 0": edited(cosine_lr, ("peak * (step + 1) / (warmup + 1)", "peak * step / warmup")),
        "falls to a tenth": lambda step, steps, peak, warmup: max(cosine_lr(step, steps, peak, warmup), 0.1 * peak),
        "peak twice": lambda step, steps, peak, warmup: 2 * cosine_lr(step, steps, peak, warmup),
    },
    "Run": {
        "random numbers forgotten": _run(('torch.set_rng_state(tensors["random/cpu"])', "pass")),
        "generator forgotten": _run(('self.generator.set_state(tensors["random/generator"])', "pass")),
        "generator not saved": _run(
            ('tensors["random/generator"] = self.generator.get_state()', "pass"),
            ('self.generator.set_state(tensors["random/generator"])', "pass"),
        ),
        "the global state for the generator": _run(
            ('self.generator.set_state(tensors["random/generator"])', 'self.generator.set_state(tensors["random/cpu"])')
        ),
        "the last metric shown": _run(("next(iter(self.history[-1].items()))", "list(self.history[-1].items())[-1]")),
        "optimiser forgotten": _run(('optimizer.load_state_dict(optimizer.state_dict() | {"state": state})', "pass")),
        "first optimiser only": _run(("enumerate(self.optimizers)", "enumerate(self.optimizers[:1])")),
        "optimisers crossed": _run(
            ('f"optimizer/{which}/{number}/{name}": torch', 'f"optimizer/{0}/{number}/{name}": torch')
        ),
        "weights forgotten": _run(("self.model.load_state_dict(weights)", "pass")),
        "history forgotten": _run(('self.history = description["history"]', "pass")),
        "one step is repeated": _run(
            ('self.history = description["history"]', 'self.history = description["history"][:-1]')
        ),
        "recipe not compared": _run(('if description["recipe"] != self.recipe:', "if False:")),
        "tuples differ from lists": _run(("json.loads(json.dumps(recipe))", "recipe")),
        "kind not compared": _run(('if description.get("kind") != "Run":', "if False:")),
        "a misfit passes": _run(
            ("self.model.load_state_dict(weights)", "self.model.load_state_dict({}, strict=False)")
        ),
        "not saved at the end": _run((" or step + 1 == total", "")),
        "saved at the end only": _run(("(step + 1) % self.save_every == 0 or", "")),
        "saved one step late": _run(("(step + 1) % self.save_every == 0", "step and step % self.save_every == 0")),
        "any save_every": _run(("if save_every < 1:", "if save_every < -9:")),
        "log not counted": _run(("if len(self.history) != step + 1:", "if len(self.history) < step + 1:")),
        "tensors in the history": _run(("x.item() if isinstance(x, Tensor) else x", "x")),
        "a damaged file starts again": _run(
            (
                "tensors, description = load_checkpoint(path)",
                "try: tensors, description = load_checkpoint(path)\n        except ValueError: return",
            )
        ),
    },
    "require_finite": {
        "nan only": edited(require_finite, ("if not torch.isfinite(x).all()", "if x.isnan().any()")),
        "inf only": edited(require_finite, ("if not torch.isfinite(x).all()", "if x.isinf().any()")),
        "never": lambda quantity, x, step: None,
        "always": edited(require_finite, ("if not torch.isfinite(x).all()", "if True")),
        "ValueError": edited(require_finite, ("raise FloatingPointError", "raise ValueError")),
        "all, not any": edited(require_finite, ("if not torch.isfinite(x).all()", "if not torch.isfinite(x).any()")),
        "forgets the step": edited(require_finite, ("step {step}: ", "")),
    },
    "update": {
        "gradients pile up": edited(update, ("    model.zero_grad()\n", "")),
        "not clipped": edited(update, ("parameters(), max_norm)", "parameters(), torch.inf)")),
        "norm after clipping": lambda *a: update(*a).clamp(max=a[-1]),
        "rate not set": edited(update, ('group["lr"] = lr * group.get("lr_scale", 1.0)', "pass")),
        "scale forgotten": edited(update, (' * group.get("lr_scale", 1.0)', "")),
        "first optimiser only": edited(update, ("in optimizers:", "in optimizers[:1]:")),
        "gradient not checked": edited(update, ('    require_finite("gradient norm", norm, step)\n', "")),
        "loss not checked": edited(update, ('    require_finite("loss", loss.detach(), step)\n', "")),
        "checked too late": edited(
            update,
            ('    require_finite("gradient norm", norm, step)\n', ""),
            ("    return norm", '    require_finite("gradient norm", norm, step)\n    return norm'),
        ),
    },
}
EXEMPT = set()
