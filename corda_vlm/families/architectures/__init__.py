"""What is known of each architecture, as data: a row says where its blocks are, and which weight matrices are in one."""
