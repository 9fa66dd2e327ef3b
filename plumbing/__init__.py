"""What a reader of the paper can leave closed: files, texts as tokens, flags, the run folder.

texts.py     chat templates, special tokens, the end of an answer, cuts
rows.py      JSON Lines, checked row by row; tables.py Parquet and hub ids; hub.py asked once
flags.py     types of flags; command_line.py parses and checks them
run_folder.py    what a run writes; checkpoints.py --save_steps, --resume; records.py JSON
finite.py    a run ends where a number is none
fits.py      tokens and positions that a model has
scorers.py   loading; encoders and other heads than `score`
functions.py a user's function, as --gold_reward
progress.py  a bar, or lines
errors.py    one line for the user
"""
