"""Runs: brings pipeline and flash_model together on N devices."""
