"""Where episodes come from: one file and one record a data set."""
