"""The synthetic tasks of the Kimi Linear report (section 5.1), learned by KDA and by two layers that lack a part."""
