"""`fedalign export`: what others load, with a model card."""
