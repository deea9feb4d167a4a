"""What a repair leaves on the screen, in folders and in files.

In: a report, weights and a trainer. Out: a progress line, files, pictures of samples.
"""
