"""The tasks of the model: what each asks, what it should answer, how the answer is searched for."""

from unival.tasks import (
    audio_caption,
    image_caption,
    image_text_matching,
    video_caption,
    video_qa,
    video_text_matching,
    vqa,
)
from unival.tasks.answer_matching import AnswerMatching
from unival.tasks.base import Task
from unival.tasks.grounded_caption import GroundedCaption
from unival.tasks.grounding import Grounding
from unival.tasks.image_generation import ImageGeneration
from unival.tasks.visual_entailment import VisualEntailment

_ALL: tuple[Task, ...] = (
    image_caption.TASK,
    image_text_matching.TASK,
    vqa.TASK,
    AnswerMatching(),
    Grounding(),
    GroundedCaption(),
    video_caption.TASK,
    video_text_matching.TASK,
    video_qa.TASK,
    audio_caption.TASK,
    VisualEntailment(),
    ImageGeneration(),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
