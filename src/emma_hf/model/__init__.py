"""The code that travels to the Hub beside the weights: all files of this folder but this one."""
