"""Data augmentation system: event contracts, Kafka in and out, the label join, the logit store."""
