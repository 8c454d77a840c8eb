"""The Advantage Model: its score and its loss."""
