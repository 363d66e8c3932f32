"""What goes with what: facts about objects, rules over facts, one error that renders them."""
