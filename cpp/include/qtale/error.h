// The errors of the core; their messages are sentences for users (operation, value, what is accepted).
#pragma once

#include <stdexcept>
#include <string>

namespace qtale {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A value that the operation does not accept.
class InputError : public Error {
 public:
  using Error::Error;
};

}  // namespace qtale
