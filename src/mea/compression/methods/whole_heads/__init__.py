"""Methods whose components are whole heads, as in arXiv 2601.19611: scalar mixing, or shared heads."""
