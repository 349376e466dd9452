"""FedAlign-MoE: federated fine-tuning of Mixture-of-Experts language models (arXiv 2603.21276)."""

__version__ = "0.1.0"
