"""UnIVAL: train and use a unified image-video-audio-text model."""
