"""An adapter from a full fine-tune."""
