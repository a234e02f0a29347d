"""Question answering on videos."""

from unival.tasks.answering import Answering

TASK = Answering("video_qa", ("video_qa",))
