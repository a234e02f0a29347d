"""Visual question answering on images."""

from unival.tasks.answering import Answering

TASK = Answering("vqa", ("qa",))
