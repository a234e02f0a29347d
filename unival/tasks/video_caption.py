"""Video captioning: pretraining on captioned clips, fine-tuning on MSRVTT and ActivityNet."""

from unival.tasks.captioning import Captioning

TASK = Captioning("video_caption", ("video_caption",), medium="video", fine_tuned_medium="video")
