"""Rows of the table that is compared with transformers, one file for families that are alike."""
