d = { 'settings': {}, 'syms': {}}
