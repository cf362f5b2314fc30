"""The last hidden state of any language model."""
