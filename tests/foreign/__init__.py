"""Training-time networks as other people write them: other names, other styles, none of structrep's own modules.

Written from the papers and from descriptions of the published implementations; no code of theirs is copied.
`cases.py` lists them with what is expected of each; `truth.py` has the float64 comparisons.
"""
