"""The models that pages start from: small files, made by the recipe in the code, as good as their files say."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from rlhfkit.checkpoints import load_checkpoint
from rlhfkit.collect import draw_comparisons
from rlhfkit.models import GPT, ScalarModel
from rlhfkit.reviews import Annotators, encode_pairs, review_grammar
from rlhfkit.train_preference import score_responses

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "chapters" / "data"
SFT, REWARD = FOLDER / "reviews_sft.safetensors", FOLDER / "reviews_reward.safetensors"


def load_recipes():
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "book" / "make_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipes = load_recipes()


def info(path):
    return load_checkpoint(path)[1]["info"]


@pytest.mark.parametrize("path", [SFT, REWARD], ids=lambda path: path.stem)
def test_a_file_is_small_and_of_the_sizes_and_the_vocabulary_in_the_code(path):
    assert path.stat().st_size <= 1.1e6
    tensors, description = load_checkpoint(path)
    tokenizer = review_grammar().tokenizer
    expected = {**recipes.SIZES, "vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id, "dropout": 0.0}
    assert description["config"] == expected
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in tensors.values())
    model = (ScalarModel if path == REWARD else GPT).load(path)
    assert tensors.keys() == model.state_dict().keys()


@pytest.mark.parametrize(("path", "recipe"), [(SFT, "SFT"), (REWARD, "REWARD")], ids=["sft", "reward"])
def test_a_file_was_made_by_the_recipe_in_the_code(path, recipe):
    assert info(path)["recipe"] == json.loads(json.dumps(getattr(recipes, recipe))), (
        "make the models again: make models"
    )
    assert isinstance(info(path)["seed"], int)


@torch.no_grad()
def test_the_gap_of_the_sft_model_is_what_its_file_says_and_what_the_book_promises():
    """On the first 1,000 of the held-out reviews, within four standard errors; the surprise of every token by hand."""
    grammar, model = review_grammar(), GPT.load(SFT).eval()
    generator = torch.Generator().manual_seed(recipes.HELD_OUT["data_seed"])
    prompts, reviews = (x[:1000] for x in grammar.sample_tokens(recipes.HELD_OUT["reviews"], generator))
    mask, sequence, last = reviews != 0, torch.cat([prompts, reviews], 1), prompts.shape[1] - 1
    excess = torch.zeros(len(reviews), dtype=torch.float64)
    for rows in torch.arange(len(reviews)).split(250):
        x = sequence[rows]
        surprises = []
        for logits in (model.logits(x).double(), grammar.logits(x)):
            p = logits[:, last:-1].softmax(-1).gather(2, x[:, last + 1 :, None])[..., 0]
            surprises.append(torch.where(mask[rows], -p.log(), 0.0).sum(1))
        excess[rows] = surprises[0] - surprises[1]
    gap = float(excess.sum() / mask.sum())
    reached = info(SFT)["reached"]["gap"]
    error = float((excess - gap * mask.sum(1)).std() * len(excess) ** 0.5 / mask.sum())
    assert abs(gap - reached) < 4 * error + 1e-4, (gap, reached, error)
    assert 0 < reached <= 0.02


def test_the_accuracy_of_the_reward_model_is_what_its_file_says_and_near_its_ceiling():
    """On 512 fresh comparisons, with the annotators' probabilities in place of labels, within four standard errors."""
    sft, model = GPT.load(SFT).eval(), ScalarModel.load(REWARD).eval()
    comparisons = draw_comparisons(sft, 512, torch.Generator().manual_seed(99))
    annotators = Annotators(noise=recipes.REWARD["noise"])
    prompts, first, second = encode_pairs([c.pair("first") for c in comparisons])
    prefers_first = score_responses(model, prompts, first) > score_responses(model, prompts, second)
    p = torch.tensor([annotators.probability(c) for c in comparisons], dtype=torch.float64)
    agreement = torch.where(prefers_first, p, 1 - p)
    reached, pairs = info(REWARD)["reached"], recipes.HELD_OUT_PAIRS["pairs"]
    error = float((agreement.var() / len(p) + reached["accuracy"] * (1 - reached["accuracy"]) / pairs).sqrt())
    assert abs(float(agreement.mean()) - reached["accuracy"]) < 4 * error
    assert abs(float(torch.maximum(p, 1 - p).mean()) - reached["ceiling"]) < 4 * error
    assert reached["ceiling"] - 0.04 < reached["accuracy"] < reached["ceiling"] + 0.04


def test_the_reward_model_prefers_what_the_judge_prefers():
    tokenizer, model = review_grammar().tokenizer, ScalarModel.load(REWARD).eval()
    prompts = tokenizer.encode_batch(["review of a silent comedy :"] * 4, "left")
    texts = (
        "the plot was brilliant . what a joy .",
        "the plot was not bad . five stars from me .",
        "the plot was not good . one star from me .",
        "the plot was awful . what a waste .",
    )
    scores = score_responses(model, prompts, tokenizer.encode_batch(texts, "right", eos=True))
    assert scores[:2].min() > scores[2:].max() + 1
