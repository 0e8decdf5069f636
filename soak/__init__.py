"""The soak: the whole local stack under work and faults, watched the whole time, held to equality.

`python -m soak --minutes 10 --seed 7` (make soak MINUTES=10 SEED=7) runs one. `run` is one soak from start to stop;
`schedule` (pure) says which faults strike when, `faults` makes them, `hostile` a hostile project's, `disk` is the
machines' own; `writing` (pure) is what people and AI turns do to a project, `editors` saves it; `stack`, `program` and
`supabase` are the processes; `watch` looks at memory, descriptors and lag, `equality` at the trees, `logs` at what was
said; `growth` (pure) says whether a process grows, `chart` (pure) draws, `report` writes it all down.
"""
