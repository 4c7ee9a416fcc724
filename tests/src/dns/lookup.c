/* Prints the addresses that getaddrinfo finds for a name, one a line. */
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int count, char **words) {
  struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
  if (count != 2 || getaddrinfo(words[1], NULL, &hints, &found)) return 1;
  for (; found; found = found->ai_next) {
    char text[128];
    if (getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof text, NULL, 0, NI_NUMERICHOST)) return 1;
    puts(text);
  }
}
