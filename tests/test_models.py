"""The tabular policy: one row for every prompt and prefix, so that it can represent any distribution."""

import itertools

import pytest
import torch

from planting import close, edited, f64, normal, raises
from rlhfkit.exact import enumerate_responses
from rlhfkit.models import TabularPolicy, TabularValue

pytestmark = pytest.mark.usefixtures("device")


def marked(TabularPolicy):
    """V = 2, T = 3, two prompts; every logit is its own number: 100 p + 10 row + token."""
    p, row, token = torch.meshgrid(torch.arange(2), torch.arange(7), torch.arange(2), indexing="ij")
    return TabularPolicy(2, 3, 2, table=(100 * p + 10 * row + token).double())


def test_each_prefix_reads_its_own_row_in_order_of_length_then_lexicographically(TabularPolicy=TabularPolicy):
    policy = marked(TabularPolicy)
    prefixes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    for p, (row, prefix) in itertools.product((0, 1), enumerate(prefixes)):
        tokens = torch.tensor([[p, *prefix]])
        start = 100 * p + 10 * row
        assert policy.logits(tokens)[0, -1].tolist() == [start, start + 1]


def test_logits_after_every_position_come_from_the_tokens_so_far(TabularPolicy=TabularPolicy):
    policy = TabularPolicy(3, 4, 2, table=normal(2, 40, 3))
    tokens = torch.tensor([[1, 0, 2, 1, 2], [0, 2, 2, 0, 1]])
    whole = policy.logits(tokens)
    for length in range(1, 5):
        close(policy.logits(tokens[:, :length]), whole[:, :length])
        assert policy.prefixes(tokens)[:, length - 1].lt(40).all()
    assert (whole[:, -1] == 0).all() and policy.prefixes(tokens)[:, -1].tolist() == [-1, -1]
    close(policy(tokens), whole)


def test_no_two_prefixes_share_a_row(TabularPolicy=TabularPolicy):
    policy = TabularPolicy(3, 3)
    rows = set()
    for length in range(3):
        for prefix in itertools.product(range(3), repeat=length):
            rows.add(policy.prefixes(torch.tensor([[0, *prefix]]))[0, -1].item())
    assert rows == set(range(policy.count_prefixes(3, 3))) == set(range(13))


def test_any_table_is_a_distribution_over_responses(TabularPolicy=TabularPolicy):
    for eos_id in (None, 0, 2):
        tokens, mask = enumerate_responses(3, 3, eos_id)
        policy = TabularPolicy(3, 3, 1, table=normal(1, 13, 3))
        sequences = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
        logprobs = policy.logits(sequences).log_softmax(-1)[:, :-1].gather(-1, tokens[..., None])[..., 0]
        close(torch.where(mask, logprobs, 0.0).sum(1).exp().sum(), f64(1.0))


def test_what_a_table_needs_to_know_is_the_number_of_a_row_and_later_positions_can_be_read_alone(
    TabularPolicy=TabularPolicy,
):
    policy = marked(TabularPolicy)
    tokens = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]])
    hidden = policy.hidden(tokens)
    assert hidden.tolist() == [[0, 2, 5, 14], [7, 8, 11, 14]]  # 14 = P M: nothing follows
    close(policy.unembed(hidden[:, 2:]), policy.logits(tokens)[:, 2:])


def test_a_cache_takes_up_where_the_tokens_before_ended(TabularPolicy=TabularPolicy):
    """In pieces of every size, up to a whole response; two batches do not disturb each other."""
    policy = marked(TabularPolicy)
    tokens = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 0]])
    for sizes in ((1, 1, 1, 1), (2, 2), (1, 3), (3, 1), (4,)):
        caches, parts = [policy.new_cache(3, 4), policy.new_cache(2, 4)], [[], []]
        for piece in tokens.split(sizes, 1):
            for cache, rows, found in zip(caches, (piece, piece[1:].flip(0)), parts, strict=True):
                found.append(policy.hidden(rows, cache))
        assert torch.cat(parts[0], 1).equal(policy.hidden(tokens)), sizes
        assert torch.cat(parts[1], 1).equal(policy.hidden(tokens[1:].flip(0))), sizes
        assert [cache.used for cache in caches] == [4, 4]


def test_a_cache_keeps_its_prompts_when_the_tensor_of_tokens_is_used_again(TabularPolicy=TabularPolicy):
    policy, tokens = marked(TabularPolicy), torch.tensor([[1]])
    cache = policy.new_cache(1, 4)
    policy.hidden(tokens, cache)
    tokens.fill_(0)
    assert policy.hidden(tokens, cache).tolist() == [[8]]


def test_a_cache_refuses_another_batch_and_tokens_after_the_last(TabularPolicy=TabularPolicy):
    policy, tokens = marked(TabularPolicy), torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]])
    cache = policy.new_cache(2, 4)
    raises(ValueError, lambda: policy.hidden(tokens[:1, :2], cache), "tokens", "1 rows", "2")
    raises(ValueError, lambda: policy.hidden(torch.tensor([[0], [2]]), cache), "tokens", "[0, 2]", "[0, 1]")
    policy.hidden(tokens[:, :3], cache)
    raises(ValueError, lambda: policy.hidden(tokens[:1, 3:], cache), "tokens", "1 rows", "2")
    raises(ValueError, lambda: policy.hidden(tokens[:, 2:], cache), "tokens", "(2, 2) after 3", "at most 4 together")
    assert policy.hidden(tokens[:, 3:], cache).equal(policy.hidden(tokens)[:, 3:])  # no refused token was taken in


def test_gradient_reaches_the_rows_that_were_read_and_no_other(TabularPolicy=TabularPolicy):
    policy = marked(TabularPolicy)
    policy.logits(torch.tensor([[1, 0, 1, 1]])).sum().backward()
    read = policy.table.grad.abs().sum(-1).nonzero().tolist()
    assert read == [[1, 0], [1, 1], [1, 4]]


def test_table_starts_uniform_in_double_precision_and_is_copied(TabularPolicy=TabularPolicy):
    policy = TabularPolicy(4, 2)
    assert policy.table.dtype == torch.float64 and policy.table.requires_grad and (policy.table == 0).all()
    table = normal(1, 5, 4)
    policy = TabularPolicy(4, 2, 1, table)
    with torch.no_grad():
        policy.table.zero_()
    assert (table != 0).all()
    assert TabularPolicy(4, 2, 1, table.float()).logits(torch.tensor([[0, 1]])).dtype == torch.float32


def test_policy_refuses_what_it_has_no_row_for(TabularPolicy=TabularPolicy):
    policy = TabularPolicy(3, 2, 2)
    for rows in ([[2]], [[-1]], [[0, 3]], [[0, -1]], [[0, 0, 0, 0]]):
        raises(ValueError, lambda r=rows: policy.logits(torch.tensor(r)), "tokens")
    raises(ValueError, lambda: policy.logits(torch.tensor([0, 1])), "tokens", "(2,)")
    raises(ValueError, lambda: TabularPolicy(3, 2, 2, torch.zeros(2, 4, 2)), "table", "(2, 4, 2)", "(2, 4, 3)")
    for sizes in ((1, 2, 1), (2, 0, 1), (2, 2, 0)):
        raises(ValueError, lambda s=sizes: TabularPolicy(*s), str(sizes))


def marked_values(TabularValue, dtype=torch.float64):
    """V = 2, T = 3, two prompts; every value is its own number: 100 p + row + 1."""
    value = TabularValue(TabularPolicy(2, 3, 2).to(dtype))
    value.table.data = 100 * torch.arange(2, dtype=dtype)[:, None] + torch.arange(1, 8, dtype=dtype)
    return value


def test_each_prefix_has_a_value_of_its_own_and_nothing_follows_a_whole_response(TabularValue=TabularValue):
    value = marked_values(TabularValue)
    prefixes = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
    for p, (row, prefix) in itertools.product((0, 1), enumerate(prefixes)):
        assert value.values(torch.tensor([[p, *prefix]]))[0, -1] == 100 * p + row + 1
    tokens = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]])
    expected = [[101, 102, 105, 0], [1, 3, 6, 0], [101, 103, 107, 0]]
    assert value.values(tokens).tolist() == expected
    for length in range(1, 4):
        assert value.values(tokens[:, :length]).tolist() == [row[:length] for row in expected]


def test_values_start_at_0_in_the_dtype_and_the_shape_of_the_policy(TabularValue=TabularValue):
    for dtype in (torch.float32, torch.float64):
        policy = TabularPolicy(3, 2, 2, normal(2, 4, 3)).to(dtype)
        value = TabularValue(policy)
        found = value.values(torch.tensor([[0, 1, 2], [1, 2, 2]]))
        assert found.shape == (2, 3) and found.dtype == value.table.dtype == dtype and (found == 0).all()
        assert value.table.shape == (2, 4) and value.table.device == policy.table.device
        assert [name for name, _ in value.named_parameters()] == ["table"]  # the policy is no part of it
        with torch.no_grad():
            value.table.fill_(1.0)
        assert policy.table.detach().equal(normal(2, 4, 3).to(dtype))


def test_gradient_reaches_the_values_that_were_read_and_no_other(TabularValue=TabularValue):
    value = marked_values(TabularValue)
    total = value.values(torch.tensor([[1, 0, 1, 1], [1, 0, 0, 0]])).sum()
    assert total.requires_grad
    total.backward()
    close(value.table.grad, f64([[0.0] * 7, [2, 2, 0, 1, 1, 0, 0]]))


READ = "_rows(self.table, hidden)"
PLANTED = {
    "TabularPolicy": {
        "digits in the other order": edited(
            TabularPolicy,
            (
                "self.vocab_size * columns[-1] + 1 + token",
                "columns[-1] + (1 + token) * self.vocab_size ** (len(columns) - 1)",
            ),
        ),
        "rows of every length start at 0": edited(TabularPolicy, ("columns[-1] + 1 + token", "columns[-1] + token")),
        "only the last token counts": edited(
            TabularPolicy,
            ("self.vocab_size * columns[-1] + 1", "self.count_prefixes(self.vocab_size, len(columns))"),
        ),
        "one row for all prompts": edited(TabularPolicy, ("prompts.unsqueeze(1) * count", "0 * prompts.unsqueeze(1)")),
        "sees one token ahead": edited(TabularPolicy, ("tokens.unbind(1)", "tokens.roll(-1, 1).unbind(1)")),
        "a cache forgets its tokens": edited(
            TabularPolicy, ("cache.rows, cache.used = prompts.clone(), rows[:, -1]", "_, cache.used = prompts, 0")
        ),
        "a cache shares its prompts": edited(TabularPolicy, ("prompts.clone()", "prompts")),
        "a cache forgets its prompts": edited(TabularPolicy, ("cache.prompts, cache.rows,", "_, cache.rows,")),
        "a cache remembers its first row": edited(TabularPolicy, ("rows[:, -1], cache.used", "rows[:, 0], cache.used")),
        "a cache counts pieces": edited(TabularPolicy, ("cache.used + tokens.shape[1]", "cache.used + 1")),
        "a cache gives its last row again": edited(
            TabularPolicy, ("(cache.rows, tokens)[:, 1:]", "(cache.rows, tokens)[:, :-1]")
        ),
        "a cache of another batch is read": edited(TabularPolicy, ("len(tokens) != len(cache.rows)", "False")),
        "a cache goes on after the last token": edited(
            TabularPolicy, ("tokens.shape[1] <= limit - used:", "tokens.shape[1] <= limit:")
        ),
        "nothing is checked before a cache": edited(
            TabularPolicy,
            ("        if used:\n            return\n", "        if cache is not None:\n            return\n"),
        ),
        "table not copied": edited(TabularPolicy, ("table.detach().clone()", "table.detach()")),
        "last row read after a full response": edited(
            TabularPolicy, ("self.num_prompts * count)", "prompts.unsqueeze(1) * count + count - 1)")
        ),
        "first row of the next prompt read after a full response": edited(
            TabularPolicy, ("self.num_prompts * count)", "prompts.unsqueeze(1) * count + count)")
        ),
        "rows without gradient": edited(
            TabularPolicy, ("_rows(self.table, hidden)", "_rows(self.table.detach(), hidden) + 0 * self.table.sum()")
        ),
        "negative prompts not refused": edited(TabularPolicy, ("low < 0 or ", "")),
        "starts in single precision": edited(
            TabularPolicy, ("torch.zeros(shape, dtype=torch.float64)", "torch.zeros(shape)")
        ),
    },
    "TabularValue": {
        "one value for all prompts": edited(
            TabularValue, (READ, "_rows(self.table[:1].expand_as(self.table), hidden)")
        ),
        "one value for all prefixes": edited(
            TabularValue, (READ, "_rows(self.table[:, :1].expand_as(self.table), hidden)")
        ),
        "something after a whole response": edited(
            TabularValue, (READ, "_rows(self.table, hidden.clamp(max=self.table.numel() - 1))")
        ),
        "nothing before the response": edited(TabularValue, (READ, f"{READ} * (hidden % self.table.shape[1] > 0)")),
        "one token late": edited(TabularValue, ("self.trunk.hidden(tokens)", "self.trunk.hidden(tokens).roll(1, 1)")),
        "in single precision": edited(
            TabularValue, ("torch.zeros_like(policy.table[..., 0])", "torch.zeros_like(policy.table[..., 0]).float()")
        ),
        "starts at the logits": edited(
            TabularValue, ("torch.zeros_like(policy.table[..., 0])", "policy.table.detach()[..., 0]")
        ),
        "the policy is a part": edited(
            TabularValue, ('object.__setattr__(self, "trunk", policy)', "self.trunk = policy")
        ),
        "no gradient": edited(TabularValue, (READ, "_rows(self.table.detach(), hidden)")),
    },
}
EXEMPT = {"Policy", "RowCache"}
