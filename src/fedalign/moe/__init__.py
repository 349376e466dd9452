"""The only place that knows how Hugging Face spells Mixture-of-Experts models."""
