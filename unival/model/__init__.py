"""The unified model: configuration, encoders of the media, encoder and decoder."""
