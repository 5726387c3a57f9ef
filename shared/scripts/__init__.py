"""The edge: flags, prompt files, results on disk, tables in READMEs, torchrun."""
