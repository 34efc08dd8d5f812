"""One quantizer per file: where it places its codes within a range, and what there is to search about it."""
