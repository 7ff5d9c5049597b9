"""A class: labs handed out, collected, run in a sandbox, judged outside it, reported."""
