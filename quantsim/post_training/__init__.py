"""What calibration can do beside finding ranges: each an option of ``QuantConfig.post_training``, or a config that a search gives."""
