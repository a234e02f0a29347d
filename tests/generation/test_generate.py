"""Answers about a user's file: what is asked, what may be answered, and what is refused."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unival.data.batch import collate
from unival.data.media import MediaOptions
from unival.generation import generate
from unival.generation.generate import (
    answer_list,
    generate_answer,
    inference_example,
    search_answers,
    to_model,
)
from unival.generation.search import Hypothesis
from unival.model.configuration import UnivalConfig
from unival.model.modeling import UnivalForConditionalGeneration
from unival.tasks import TASKS
from unival.tasks.base import Decoding
from unival.vocabulary import BOS, EOS, FIRST_BIN, FIRST_CODE, NUM_BINS

SAMPLES = Path(__file__).parents[2] / "samples"
CAT = SAMPLES / "images" / "cat.jpg"  # 512 x 384
SMALL = MediaOptions(image_size=64, video_size=32, video_frames=4, audio_samples=48_000)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = UnivalConfig(
        d_model=32,
        ffn_dim=64,
        encoder_layers=1,
        decoder_layers=1,
        num_heads=2,
        image_layers=(1, 1, 1, 1),
        image_channels=(8, 16, 32, 32),
        video_layers=None,
        initializer_range=0.3,  # answers that depend on the input, unlike those of 0.02
    )
    return UnivalForConditionalGeneration(config).eval()


def batch_of(task, sources, fine_tuning=False):
    pictures = [torch.full((3, 64, 64), 40 * n, dtype=torch.uint8) for n in range(len(sources))]
    examples = [(inference_example(task, s, fine_tuning), n) for n, s in enumerate(sources)]
    return collate(examples, pictures, "image")


@pytest.mark.parametrize("fine_tuning", [False, True], ids=["from <s>", "after the question"])
@torch.inference_mode()
def test_chosen_answer_is_the_likeliest_of_the_list(model, vocabulary, fine_tuning):
    answers = ["cat", "dog", "red", "two", "on"]
    tokens = [vocabulary.encode_text(f" {answer}") for answer in answers]
    assert all(len(ids) == 1 for ids in tokens)  # the end is certain after the only token
    task = TASKS["vqa"]
    for text in (" what is this?", " how many?"):
        source = vocabulary.source(text)
        batch = batch_of(task, [source], fine_tuning)
        found = search_answers(model, task, batch, answer_list(task, answers, vocabulary))[0]
        prompt = source[:-1] if fine_tuning else [BOS]
        encoder = model.encoder(**to_model(model, batch))
        ids = torch.tensor([prompt])
        logits = model(decoder_input_ids=ids, encoder_outputs=encoder).logits[0, -1]
        best = max(range(5), key=lambda n: float(logits[tokens[n][0]]))
        assert found.tokens == [*tokens[best], EOS]


@pytest.mark.parametrize("scoring", ["beam", "all_candidates"])
def test_prompts_of_different_lengths_in_a_batch_give_what_each_gives_alone(
    model, vocabulary, scoring
):
    task = TASKS["vqa"]
    rules = replace(task.decoding, scoring=scoring)
    sources = [vocabulary.source(t) for t in (" why?", " what is it there?", " who is it?")]
    choices = answer_list(task, ["ball of yarn", "cat", "grey cat", "no", "yes"], vocabulary)
    together = batch_of(task, sources, fine_tuning=True)
    found = search_answers(model, task, together, choices, decoding=rules)
    for row, source in enumerate(sources):
        alone = batch_of(task, [source], fine_tuning=True)
        alone["pixel_values"] = together["pixel_values"][row : row + 1]
        expected = search_answers(model, task, alone, choices, decoding=rules)[0]
        assert found[row].tokens == expected.tokens
        assert found[row].score == pytest.approx(expected.score, abs=1e-4)


@pytest.mark.parametrize("fine_tuning", [False, True], ids=["from <s>", "after the question"])
@torch.inference_mode()
def test_visual_entailment_compares_its_three_words(model, vocabulary, fine_tuning):
    task = TASKS["visual_entailment"]
    assert task.decoding.scoring == "all_candidates"  # as in the released evaluation
    sources = [vocabulary.source(t) for t in (" a cat?", " does it show a dog?", " is it red?")]
    batch = batch_of(task, sources, fine_tuning)
    found = search_answers(model, task, batch, answer_list(task, (), vocabulary))
    words = [vocabulary.encode_text(f" {word}")[0] for word in ("no", "yes", "maybe")]
    encoder = model.encoder(**to_model(model, batch))
    logits = model(decoder_input_ids=batch["decoder_input_ids"], encoder_outputs=encoder).logits
    for row, source in enumerate(sources):
        last = len(source) - 2 if fine_tuning else 0
        log_probs = logits[row, last, words].double().log_softmax(0)  # </s> is certain behind them
        assert found[row].tokens == [words[int(log_probs.argmax())], EOS]
        assert found[row].score == pytest.approx(float(log_probs.max()), abs=1e-5)


def test_all_candidates_want_a_list(model, vocabulary):
    task = TASKS["vqa"]
    batch = batch_of(task, [vocabulary.source(" what?")])
    rules = replace(task.decoding, scoring="all_candidates")
    with pytest.raises(ValueError, match="'vqa': scoring 'all_candidates' needs a list of answers"):
        search_answers(model, task, batch, None, decoding=rules)


def test_scores_follow_the_decoding(model, vocabulary):
    task = TASKS["vqa"]
    batch = batch_of(task, [vocabulary.source(" what?")])
    choices = answer_list(task, ["cat", "grey dog", "grey cat", "two"], vocabulary)

    def best(**options):
        rules = replace(task.decoding, **options)
        return search_answers(model, task, batch, choices, decoding=rules)[0]

    for penalty in (0.0, 1.0, 3.0):
        shared = best(normalize_scores=True, length_penalty=penalty, beam_size=1)
        assert shared.score == pytest.approx(
            sum(shared.positional_scores) / len(shared.tokens) ** penalty, rel=1e-5
        )
    # Very hot logits are all equal: the first token is one of three, then one of two or none.
    hot = best(temperature=1e6)
    assert hot.score == pytest.approx(-math.log(3), abs=1e-3)
    assert best(temperature=1e6, scoring="all_candidates").score == pytest.approx(
        -math.log(3), abs=1e-3
    )


def test_a_decoding_without_constraint_makes_no_use_of_the_list(model, vocabulary):
    task = TASKS["vqa"]
    batch = batch_of(task, [vocabulary.source(" what?")])
    choices = answer_list(task, ["cat"], vocabulary)
    rules = replace(task.decoding, constraint="none", max_length=3)
    free = search_answers(model, task, batch, choices, decoding=rules)[0]
    assert free.tokens != [*choices.tokens[0], EOS]
    assert free == search_answers(model, task, batch, None, decoding=rules)[0]


@pytest.mark.parametrize("beams", [1, 5])
@torch.inference_mode()
def test_grounding_with_bins_gives_four_of_them_and_the_end(model, vocabulary, beams):
    task = TASKS["grounding"]
    rules = replace(task.decoding, constraint="bins")
    batch = batch_of(task, [vocabulary.source(t) for t in (" where is the cat?", " the yarn")])
    encoder = model.encoder(**to_model(model, batch))
    found = search_answers(model, task, batch, None, beams, rules)
    for row, hypothesis in enumerate(found):
        *bins, end = hypothesis.tokens
        assert end == EOS and len(bins) == 4
        assert all(FIRST_BIN <= token < FIRST_BIN + NUM_BINS for token in bins)
        ids = torch.tensor([[BOS, *bins]]).expand(2, -1)
        logits = model(decoder_input_ids=ids, encoder_outputs=encoder).logits[row, :4].double()
        among_bins = logits[:, FIRST_BIN:].log_softmax(-1)
        each = [float(among_bins[n, token - FIRST_BIN]) for n, token in enumerate(bins)]
        assert hypothesis.score == pytest.approx(sum(each) / 5, abs=1e-5)  # </s> is certain
        if beams == 1:
            if bins[0] == bins[1] == bins[2]:  # no trigram comes twice
                among_bins[3, bins[2] - FIRST_BIN] = -torch.inf
            assert bins == (among_bins.argmax(-1) + FIRST_BIN).tolist()


@torch.inference_mode()
def test_image_codes_are_chosen_greedily_among_codes(model, vocabulary):
    task = TASKS["image_caption"]
    rules = Decoding(beam_size=1, max_length=9, min_length=9, constraint="codes")
    batch = batch_of(task, [vocabulary.source(t) for t in (" a cat", " red yarn")])
    encoder = model.encoder(**to_model(model, batch))
    found = search_answers(model, task, batch, None, decoding=rules)
    for row, hypothesis in enumerate(found):
        *codes, end = hypothesis.tokens
        assert end == EOS and len(codes) == 9
        ids = torch.tensor([[BOS, *codes]]).expand(2, -1)
        out = model(
            decoder_input_ids=ids,
            encoder_outputs=encoder,
            code_mask=torch.tensor([True, True]),  # codes have positions and a norm of their own
        )
        among = out.logits[row, :9, FIRST_CODE:FIRST_BIN]
        assert codes == (among.argmax(-1) + FIRST_CODE).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, "beam_size is at least 1, got 0"),
        ({"min_length": 0}, "min_length is at least 1, got 0"),
        ({"min_length": 5, "max_length": 4}, "max_length is at least min_length 5, got 4"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is at least 0, got -1"),
        ({"length_penalty": math.inf}, "length_penalty is a finite number, got inf"),
        ({"temperature": 0.0}, "temperature is a finite number above 0, got 0.0"),
        ({"temperature": math.nan}, "temperature is a finite number above 0, got nan"),
        ({"temperature": math.inf}, "temperature is a finite number above 0, got inf"),
        ({"constraint": "words"}, "constraint is one of none, bins, codes, answers, got 'words'"),
        ({"scoring": "all"}, "scoring is one of beam, all_candidates, got 'all'"),
        ({"scoring": "all_candidates"}, "'all_candidates' needs constraint 'answers', got 'none'"),
        (
            {"scoring": "all_candidates", "constraint": "answers"},
            "sums: normalize_scores must be False",
        ),
    ],
)
def test_a_decoding_that_cannot_be_followed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


def test_an_answer_beyond_the_limit_is_named(model, vocabulary):
    task = TASKS["vqa"]
    batch = batch_of(task, [vocabulary.source(" what?")])
    choices = answer_list(task, ["cat", "ball of yarn"], vocabulary)
    rules = replace(task.decoding, max_length=2)
    message = "answer 'ball of yarn' has 3 tokens; max_length is 2"
    for scoring in ("beam", "all_candidates"):
        with pytest.raises(ValueError, match=message):
            search_answers(model, task, batch, choices, decoding=replace(rules, scoring=scoring))
    with pytest.raises(ValueError, match=message):
        answer_list(replace(task, decoding=rules), ["ball of yarn"], vocabulary)


def test_question_in_front_does_not_shorten_the_answer(model, vocabulary):
    task = TASKS["visual_entailment"]  # 4 tokens at most; the question alone has more
    source = vocabulary.source(' does the image describe " a cat with a long ball of yarn "?')
    batch = batch_of(task, [source], fine_tuning=True)
    found = search_answers(model, task, batch, answer_list(task, (), vocabulary))[0]
    assert task.answer(found.tokens, vocabulary) in ("yes", "no", "maybe")


def test_more_beams_than_answers(model, vocabulary):
    task = TASKS["vqa"]
    batch = batch_of(task, [vocabulary.source(" what?")])
    found = search_answers(model, task, batch, answer_list(task, ["cat"], vocabulary))[0]
    assert task.answer(found.tokens, vocabulary) == "cat"


def test_answers_matter_only_to_tasks_that_choose(vocabulary):
    assert answer_list(TASKS["image_caption"], ["cat"], vocabulary) is None
    assert answer_list(TASKS["vqa"], [], vocabulary) is None
    assert answer_list(TASKS["vqa"], ["cat", "ball of yarn"], vocabulary).longest == 3
    assert answer_list(TASKS["image_text_matching"], ["cat"], vocabulary).longest == 1


def test_box_comes_back_in_pixels_of_the_picture(model, vocabulary, monkeypatch):
    bins = [0, 0, 999 * 64 // 512 + 1, 999]
    tokens = [*(FIRST_BIN + number for number in bins), EOS]
    monkeypatch.setattr(generate, "search_answers", lambda *_: [Hypothesis(tokens, -1.5, [])])
    found = generate_answer(
        model, vocabulary, "grounding", image=CAT, text="the kitten", options=SMALL
    )
    # 125 / 999 * 512 pixels of 64 in width, 512 of 64 in height
    assert found.box == pytest.approx((0, 0, 125 / 999 * 512 * 512 / 64, 512 * 384 / 64))
    assert found.score == -1.5
    assert found.text == "<bin_0> <bin_0> <bin_125> <bin_999>"


def test_what_the_model_is_asked(model, vocabulary, monkeypatch):
    asked = []

    def record_it(model, task, batch, choices, beam_size):
        asked.append((vocabulary.decode(batch["input_ids"][0]), tuple(batch["pixel_values"].shape)))
        assert not model.training
        return [Hypothesis([EOS], 0.0, [])]

    monkeypatch.setattr(generate, "search_answers", record_it)
    common = {"image": str(CAT), "options": SMALL}
    model.train()
    generate_answer(model, vocabulary, "image_caption", **common)
    generate_answer(model, vocabulary, "vqa", question="What is it", fine_tuning=True, **common)
    generate_answer(model, vocabulary, "answer_matching", question="what?", text="yarn", **common)
    generate_answer(model, vocabulary, "grounded_caption", box=(0, 0, 256, 384), **common)
    assert model.training
    model.eval()
    assert [text for text, _ in asked] == [
        " what does the image describe?",
        " what is it?",
        ' what is the answer to question " what? ". is " yarn "?',
        "  what does the region describe? region:<bin_0><bin_0><bin_62><bin_125>",
    ]
    assert {shape for _, shape in asked} == {(1, 3, 64, 64)}


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("captions", {"image": CAT}, "unknown task 'captions'"),
        ("vqa", {"question": "what?"}, "'vqa' wants one file as image=, got no file"),
        ("vqa", {"audio": CAT, "question": "what?"}, "wants one file as image=, got audio="),
        ("vqa", {"image": CAT, "video": CAT, "question": "a"}, "got image= and video="),
        ("answer_matching", {"question": "what?", "text": "a"}, "as image= or video=, got no file"),
        ("vqa", {"image": CAT, "question": " "}, "'vqa' needs question="),
        ("grounding", {"image": CAT}, "'grounding' needs text="),
        ("grounded_caption", {"image": CAT}, "'grounded_caption' needs box="),
        ("image_caption", {"image": CAT, "question": "a"}, "no use of question=; it takes only"),
        ("grounded_caption", {"image": CAT, "box": (9, 9, 5, 5)}, "box: .* is not x0, y0, x1, y1"),
        ("grounded_caption", {"image": CAT, "box": (0, 0, 900, 5)}, "box: .* outside the picture"),
        ("image_caption", {"image": "no.jpg"}, "media: no.jpg: no such file"),
        ("image_caption", {"image": CAT, "beam_size": 0}, "beam_size is at least 1"),
        ("audio_caption", {"audio": SAMPLES / "audio/opensfx_03.ogg"}, "no audio encoder"),
    ],
)
def test_refusals(model, vocabulary, task, options, message):
    with pytest.raises(ValueError, match=message):
        generate_answer(model, vocabulary, task, options=SMALL, **options)
