"""Public data sets, one file each, registered under the file's name; a file exports a `NamedSet`.

Slices and separators are those of the GPTQ papers' scripts, so that perplexities can be compared.
"""
