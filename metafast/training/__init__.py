"""Leads from a recipe to a trained learner in a folder."""
