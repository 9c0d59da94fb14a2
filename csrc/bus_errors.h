#pragma once

namespace nvae {

// From the first call on, a read of a mapped file that its file system cannot serve (SIGBUS) ends the process
// with a line on stderr that names the file. The handler before runs afterwards. 0 on success, an errno otherwise.
int report_bus_errors();

}  // namespace nvae
