"""Video-text matching, the second example of a captioned clip in pretraining."""

from unival.tasks.matching import Matching

TASK = Matching("video_text_matching", ("video_caption",), medium="video")
