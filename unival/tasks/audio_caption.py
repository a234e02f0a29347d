"""Audio captioning: fine-tuning on AudioCaps and Clotho.

The published audio models were fine-tuned with the prompt of video captioning, word for word;
their weights expect it.
"""

from unival.tasks.captioning import Captioning

TASK = Captioning("audio_caption", ("audio_caption",), medium="audio", fine_tuned_medium="video")
