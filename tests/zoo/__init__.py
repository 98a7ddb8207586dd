"""Small models that do what models do in the wild, held against plain inference and a twin written by hand."""
