"""What the TIVE scripts share; each file holds one idea (arXiv 2403.09559)."""
