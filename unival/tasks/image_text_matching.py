"""Image-text matching, the second example of a captioned image in pretraining."""

from unival.tasks.matching import Matching

TASK = Matching("image_text_matching", ("caption",), medium="image")
