"""What driver and ranks say on the connection for plans, frame by frame.

    rank   {rank, node}
    driver {nodes, segments}            all have joined
    rank   {digest, blocks, native, info, port}
                                        the model is opened; rank 0 names its store's port
    driver {blocks, native, port}       KV blocks of the smallest; whether all run step programs
    rank   {open}                       ways to the others are open
    driver {open}                       all ranks' are: names of shared memory go
    rank   {backend, bytes, seconds}    weights are loaded
    driver {go}
    rank   {rate}                       warmed up, in prompt tokens a second; serves from here
    driver Verb.PLAN + plan             answered by the last stage's first rank alone
    driver Verb.TIMINGS                 answered by all
    driver Verb.END

In place of any answer before it serves, a rank says {refused}: why this model or these settings
cannot be served.
"""


class Verb:
    """First byte of a frame to a rank that serves."""

    PLAN = b"P"
    TIMINGS = b"T"
    END = b"E"
