"""Which documents are kept. Filters apply in list order."""
