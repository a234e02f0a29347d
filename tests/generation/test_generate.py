"""Answers about a user's file: what is asked, what may be answered, and what is refused."""

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
from unival.vocabulary import BOS, EOS, FIRST_BIN

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


def test_prompts_of_different_lengths_in_a_batch_give_what_each_gives_alone(model, vocabulary):
    task = TASKS["vqa"]
    sources = [vocabulary.source(t) for t in (" why?", " what is it there?")]
    choices = answer_list(task, ["ball of yarn", "cat", "grey cat", "no", "yes"], vocabulary)
    together = batch_of(task, sources, fine_tuning=True)
    found = search_answers(model, task, together, choices)
    for row, source in enumerate(sources):
        alone = batch_of(task, [source], fine_tuning=True)
        alone["pixel_values"] = together["pixel_values"][row : row + 1]
        expected = search_answers(model, task, alone, choices)[0]
        assert found[row].tokens == expected.tokens
        assert found[row].score == pytest.approx(expected.score, abs=1e-4)


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
