"""Image captioning: pretraining on captioned images, fine-tuning on COCO."""

from unival.tasks.captioning import Captioning

TASK = Captioning("image_caption", ("caption",), medium="image", fine_tuned_medium="image")
