"""Data sets, one file each, registered under the file's name; a file exports a `NamedSet` or a `PackagedText`.

Slices and separators of public ones are those of the GPTQ papers' scripts, so that perplexities can be compared.
"""
